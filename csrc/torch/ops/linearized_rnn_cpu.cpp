// recurrence_tangent, recurrence_adjoint and recurrence_curvature on the CPU.
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "params/rnn.h"
#include "torch/alloc/workspace.h"
#include "torch/dtypes.h"
#include "torch/ops/rnn.h"
#include "torch/stable.h"
#include "torch/tensor.h"
#include "torch/tensor_args.h"
#include "torch/threads/run_team.h"

namespace llm_ext {
namespace {

// Checked sizes and inputs that the ops share. Owns dense copies for the duration of the call.
template <typename S>
class Linearized {
 public:
  Linearized(const char* op, const std::string& mode, const Tensor& w_hh, const OptionalTensor& w_hr,
             const OptionalTensor& saved, const Tensor& y, const Tensor& h0, const OptionalTensor& c0,
             const Tensor& batch_sizes, bool reverse)
      : op_(op),
        batch_sizes_(batch_sizes),
        rows_(y.dim() == 2 ? y.size(0) : -1),
        sizes_(sizes_of(mode_named(op, mode), w_hh, w_hr, h0, reverse)),
        w_hh_(input("w_hh", w_hh, gates_of(sizes_.mode) * sizes_.hidden, sizes_.output)),
        w_hr_(input("w_hr", w_hr, sizes_.output, sizes_.hidden)),
        saved_(rows_input("saved", saved, saved_width())),
        y_(rows_input("y", y, sizes_.output)),
        h0_(input("h0", h0, sizes_.batch, sizes_.output)),
        c0_(input("c0", c0, sizes_.batch, sizes_.hidden)) {
    STD_TORCH_CHECK(saved.has_value() != elman(), op_, ": saved belongs to a GRU or an LSTM");
    STD_TORCH_CHECK(c0.has_value() == lstm(), op_, ": c0 belongs to an LSTM");
  }

  // After all checks of the call.
  LinearizedRecurrence<S> params() {
    offsets_ = packed_row_offsets(batch_sizes_);
    sizes_.row_offsets = offsets_.data();
    return {sizes_, h0_.get(), c0_.get(), w_hh_.get(), w_hr_.get(), y_.get(), saved_.get()};
  }

  bool lstm() const { return sizes_.mode == Mode::kLstm; }
  bool elman() const { return saved_blocks(sizes_.mode, false) == 0; }
  int64_t saved_width() const { return saved_blocks(sizes_.mode, sizes_.projected()) * sizes_.hidden; }
  int64_t a_width() const { return blocks_of(sizes_.mode) * sizes_.hidden; }
  int64_t output() const { return sizes_.output; }
  int64_t hidden() const { return sizes_.hidden; }

  Input<S> rows_input(const char* name, const OptionalTensor& t, int64_t width) const {
    return input(name, t, rows_, width);
  }
  Input<S> state_input(const char* name, const OptionalTensor& t, int64_t width) const {
    return input(name, t, sizes_.batch, width);
  }
  Output<S> rows_output(bool wanted, int64_t width) const { return Output<S>(wanted, {rows_, width}); }
  Output<S> state_output(bool wanted, int64_t width) const { return Output<S>(wanted, {sizes_.batch, width}); }

 private:
  Input<S> input(const char* name, const OptionalTensor& t, int64_t rows, int64_t width) const {
    return Input<S>(t, op_, name, {rows, width});
  }

  RecurrenceSizes sizes_of(Mode mode, const Tensor& w_hh, const OptionalTensor& w_hr, const Tensor& h0,
                           bool reverse) const {
    STD_TORCH_CHECK(w_hh.dim() == 2 && w_hh.size(0) % gates_of(mode) == 0, op_, ": w_hh must be [G H, P], got ",
                    shape_text(w_hh));
    STD_TORCH_CHECK(h0.dim() == 2, op_, ": h0 must be [B, P], got ", shape_text(h0));
    RecurrenceSizes s = {};
    s.mode = mode;
    s.batch = check_batch_sizes(op_, rows_, batch_sizes_);
    s.steps = batch_sizes_.size(0);
    STD_TORCH_CHECK(s.steps > 0, op_, ": batch_sizes must have a step");
    s.input = 0;
    s.hidden = w_hh.size(0) / gates_of(mode);
    s.output = w_hh.size(1);
    s.reverse = reverse;
    STD_TORCH_CHECK(w_hr.has_value() == s.projected() && s.output <= s.hidden, op_,
                    ": w_hr must be given exactly if w_hh is [4 H, P] with P < H");
    return s;
  }

  // In this order: each is initialized from those above it.
  const char* op_;
  const Tensor& batch_sizes_;
  const int64_t rows_;
  RecurrenceSizes sizes_;
  const Input<S> w_hh_;
  const Input<S> w_hr_;
  const Input<S> saved_;
  const Input<S> y_;
  const Input<S> h0_;
  const Input<S> c0_;
  std::vector<int64_t> offsets_;
};

std::tuple<Tensor, Tensor, Tensor> recurrence_tangent(const std::string& mode, const Tensor& w_hh,
                                                      const OptionalTensor& w_hr, const OptionalTensor& saved,
                                                      const Tensor& y, const Tensor& h0, const OptionalTensor& c0,
                                                      const OptionalTensor& v_a, const OptionalTensor& v_h,
                                                      const OptionalTensor& v_c, const OptionalTensor& tangent_h0,
                                                      const OptionalTensor& tangent_c0, const Tensor& batch_sizes,
                                                      bool reverse) {
  constexpr const char* kOp = "recurrence_tangent";
  return with_type<float, double>(y, kOp, "y", [&](auto type) {
    using S = decltype(type);
    Linearized<S> args(kOp, mode, w_hh, w_hr, saved, y, h0, c0, batch_sizes, reverse);
    const Input<S> a_in = args.rows_input("v_a", v_a, args.a_width());
    const Input<S> h_in = args.rows_input("v_h", v_h, args.output());
    const Input<S> c_in = args.rows_input("v_c", v_c, args.hidden());
    const Input<S> h_first = args.state_input("tangent_h0", tangent_h0, args.output());
    const Input<S> c_first = args.state_input("tangent_c0", tangent_c0, args.hidden());
    const Output<S> a = args.rows_output(true, args.a_width());
    const Output<S> h = args.rows_output(true, args.output());
    const Output<S> c = args.rows_output(args.lstm(), args.hidden());

    const LinearizedRecurrenceKernels<S>& kernel = kernels().linearized_recurrence<S>();
    RecurrenceTangentParams<S> p = {args.params(), a_in.get(), h_in.get(), c_in.get(), h_first.get(),
                                    c_first.get(), a.get(),    h.get(),    c.get(),    nullptr};
    const Workspace<S> workspace(kernel.tangent_workspace(p.at.sizes));
    p.workspace = workspace.get();
    if (any_elements(a.tensor(), h.tensor(), c.tensor())) {
      run_team(team_size(kernel.threads(p.at.sizes, max_threads())),
               [&](const ThreadTeam& team) { kernel.tangent(p, team); });
    }
    return std::tuple(a.tensor(), h.tensor(), c.tensor());
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrence_adjoint(
    const std::string& mode, const Tensor& w_hh, const OptionalTensor& w_hr, const OptionalTensor& saved,
    const Tensor& y, const Tensor& h0, const OptionalTensor& c0, const OptionalTensor& g_a, const OptionalTensor& g_h,
    const OptionalTensor& g_c, const OptionalTensor& g_saved, const Tensor& batch_sizes, bool reverse) {
  constexpr const char* kOp = "recurrence_adjoint";
  return with_type<float, double>(y, kOp, "y", [&](auto type) {
    using S = decltype(type);
    Linearized<S> args(kOp, mode, w_hh, w_hr, saved, y, h0, c0, batch_sizes, reverse);
    const Input<S> a_in = args.rows_input("g_a", g_a, args.a_width());
    const Input<S> h_in = args.rows_input("g_h", g_h, args.output());
    const Input<S> c_in = args.rows_input("g_c", g_c, args.hidden());
    const Input<S> saved_in = args.rows_input("g_saved", g_saved, args.saved_width());
    const Output<S> a = args.rows_output(true, args.a_width());
    const Output<S> h = args.rows_output(true, args.output());
    const Output<S> c = args.rows_output(args.lstm(), args.hidden());
    const Output<S> dh0 = args.state_output(true, args.output());
    const Output<S> dc0 = args.state_output(args.lstm(), args.hidden());

    const LinearizedRecurrenceKernels<S>& kernel = kernels().linearized_recurrence<S>();
    RecurrenceAdjointParams<S> p = {args.params(), a_in.get(), h_in.get(), c_in.get(), saved_in.get(), a.get(),
                                    h.get(),       c.get(),    dh0.get(),  dc0.get(),  nullptr};
    const Workspace<S> workspace(kernel.adjoint_workspace(p.at.sizes));
    p.workspace = workspace.get();
    if (any_elements(a.tensor(), h.tensor(), c.tensor(), dh0.tensor(), dc0.tensor())) {
      run_team(team_size(kernel.threads(p.at.sizes, max_threads())),
               [&](const ThreadTeam& team) { kernel.adjoint(p, team); });
    }
    return std::tuple(a.tensor(), h.tensor(), c.tensor(), dh0.tensor(), dc0.tensor());
  });
}

std::tuple<Tensor, Tensor, Tensor> recurrence_curvature(const std::string& mode, const Tensor& w_hh,
                                                        const OptionalTensor& w_hr, const OptionalTensor& saved,
                                                        const Tensor& y, const Tensor& h0, const OptionalTensor& c0,
                                                        const Tensor& a, const OptionalTensor& state,
                                                        const OptionalTensor& state0, const Tensor& adjoint_h,
                                                        const OptionalTensor& adjoint_c, const Tensor& batch_sizes,
                                                        bool reverse) {
  constexpr const char* kOp = "recurrence_curvature";
  return with_type<float, double>(y, kOp, "y", [&](auto type) {
    using S = decltype(type);
    Linearized<S> args(kOp, mode, w_hh, w_hr, saved, y, h0, c0, batch_sizes, reverse);
    STD_TORCH_CHECK(state.has_value() != args.elman() && !(args.elman() && state0.has_value()), kOp,
                    ": state and state0 belong to a GRU or an LSTM");
    STD_TORCH_CHECK(adjoint_c.has_value() == args.lstm(), kOp, ": adjoint_c belongs to an LSTM");
    const Input<S> a_in = args.rows_input("a", a, args.a_width());
    const Input<S> state_in = args.rows_input("state", state, args.hidden());
    const Input<S> state_first = args.state_input("state0", state0, args.hidden());
    const Input<S> h_in = args.rows_input("adjoint_h", adjoint_h, args.hidden());
    const Input<S> c_in = args.rows_input("adjoint_c", adjoint_c, args.hidden());
    const Output<S> d_saved = args.rows_output(!args.elman(), args.saved_width());
    const Output<S> d_y = args.rows_output(!args.lstm(), args.output());
    const Output<S> d_state0 = args.state_output(!args.elman(), args.hidden());

    const LinearizedRecurrenceKernels<S>& kernel = kernels().linearized_recurrence<S>();
    const RecurrenceCurvatureParams<S> p = {args.params(), a_in.get(),    state_in.get(), state_first.get(), h_in.get(),
                                            c_in.get(),    d_saved.get(), d_y.get(),      d_state0.get()};
    if (any_elements(d_saved.tensor(), d_y.tensor(), d_state0.tensor())) {
      run_team(team_size(kernel.threads(p.at.sizes, max_threads())),
               [&](const ThreadTeam& team) { kernel.curvature(p, team); });
    }
    return std::tuple(d_saved.tensor(), d_y.tensor(), d_state0.tensor());
  });
}

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CPU, m) {
  m.impl("recurrence_tangent", TORCH_BOX(&llm_ext::recurrence_tangent));
  m.impl("recurrence_adjoint", TORCH_BOX(&llm_ext::recurrence_adjoint));
  m.impl("recurrence_curvature", TORCH_BOX(&llm_ext::recurrence_curvature));
}
