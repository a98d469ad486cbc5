// The recurrence on the CPU: check, allocate, fill, launch.
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "params.h"
#include "torch/check.h"
#include "torch/launch.h"
#include "torch/stable.h"

namespace llm_ext {
namespace {

Cell elman_cell(const char* op, const std::string& nonlinearity) {
  if (nonlinearity == "tanh") return Cell::kRnnTanh;
  if (nonlinearity == "relu") return Cell::kRnnRelu;
  if (nonlinearity == "sigmoid") return Cell::kRnnSigmoid;
  STD_TORCH_CHECK(false, op, ": nonlinearity must be tanh, relu or sigmoid, got ", nonlinearity);
}

// First row of each step, and the end: T + 1 numbers.
std::vector<int64_t> row_offsets(const char* op, const Tensor& x, const OptionalTensor& batch_sizes) {
  if (!batch_sizes.has_value()) {
    STD_TORCH_CHECK(x.dim() == 3, op, ": x must be [T, B, I], got ", shape_text(x));
    std::vector<int64_t> offsets(x.size(0) + 1);
    for (int64_t t = 0; t <= x.size(0); ++t) offsets[t] = t * x.size(1);
    return offsets;
  }
  STD_TORCH_CHECK(x.dim() == 2, op, ": x must be [N, I] with batch_sizes, got ", shape_text(x));
  STD_TORCH_CHECK(batch_sizes->dim() == 1, op, ": batch_sizes must be [T], got ", shape_text(*batch_sizes));
  const int64_t steps = batch_sizes->size(0);
  const Input<int64_t> sizes(batch_sizes, op, "batch_sizes", {steps}, ScalarType::Long);
  std::vector<int64_t> offsets(steps + 1, 0);
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t size = sizes.get()[t];
    STD_TORCH_CHECK(size >= 1 && (t == 0 || size <= sizes.get()[t - 1]), op,
                    ": batch_sizes must be positive and never rise, got ", size, " at step ", t);
    offsets[t + 1] = offsets[t] + size;
  }
  STD_TORCH_CHECK(offsets[steps] == x.size(0), op, ": batch_sizes must sum to the rows of x, ", x.size(0), ", got ",
                  offsets[steps]);
  return offsets;
}

// What every op of a recurrence takes; an op without one of the optional tensors leaves it out.
struct Arguments {
  const char* op;
  Cell cell;
  const Tensor& x;
  const OptionalTensor& h0;
  const OptionalTensor& c0;
  const Tensor& w_ih;
  const Tensor& w_hh;
  const OptionalTensor& w_hr;
  const OptionalTensor& batch_sizes;
  bool reverse;
};

const OptionalTensor kNone;

// Sizes and inputs that forward and backward have in common, checked; keeps dense copies alive for the call.
template <typename S>
class Recurrence {
 public:
  explicit Recurrence(const Arguments& a)
      : op_(a.op),
        offsets_(row_offsets(a.op, a.x, a.batch_sizes)),
        packed_(a.batch_sizes.has_value()),
        sizes(fill_sizes(a)),
        x_(dense(checked_rows("x", a.x, sizes.input))),
        h0_(state_input("h0", a.h0, sizes.output)),
        c0_(state_input("c0", a.c0, sizes.hidden)),
        w_ih_(a.w_ih, op_, "w_ih", {gates(), sizes.input}),
        w_hh_(a.w_hh, op_, "w_hh", {gates(), sizes.output}),
        w_hr_(a.w_hr, op_, "w_hr", {sizes.output, sizes.hidden}),
        layer_state_(a.h0.has_value() && a.h0->dim() == 3) {}

  int64_t gates() const { return gates_of(sizes.cell) * sizes.hidden; }

  // x and y are [T, B, *] or, packed, [N, *].
  const Tensor& checked_rows(const char* name, const Tensor& t, int64_t width) const {
    if (packed_) {
      check_tensor(t, op_, name, kScalarType<S>, {rows(), width});
    } else {
      check_tensor(t, op_, name, kScalarType<S>, {sizes.steps, sizes.batch, width});
    }
    return t;
  }

  Tensor empty_rows(int64_t width) const {
    if (packed_) return empty({rows(), width}, kScalarType<S>);
    return empty({sizes.steps, sizes.batch, width}, kScalarType<S>);
  }

  // What is kept for the backward pass, [N, width] always.
  Tensor empty_kept(bool wanted) const {
    return empty({wanted ? rows() : 0, kept_blocks(sizes.cell, sizes.projected()) * sizes.hidden}, kScalarType<S>);
  }

  // A state is [B, *], or [1, B, *] as torch.nn lays out the state of one layer; results take the shape of h0.
  Input<S> state_input(const char* name, const OptionalTensor& t, int64_t width) const {
    if (t.has_value() && t->dim() == 3) return Input<S>(t, op_, name, {1, sizes.batch, width});
    return Input<S>(t, op_, name, {sizes.batch, width});
  }

  Output<S> state_output(bool wanted, int64_t width) const {
    if (layer_state_) return Output<S>(wanted, {1, sizes.batch, width});
    return Output<S>(wanted, {sizes.batch, width});
  }

  const S* x() const { return data<S>(x_); }
  const S* h0() const { return h0_.get(); }
  const S* c0() const { return c0_.get(); }
  const S* w_ih() const { return w_ih_.get(); }
  const S* w_hh() const { return w_hh_.get(); }
  const S* w_hr() const { return w_hr_.get(); }
  int64_t rows() const { return offsets_.back(); }

 private:
  RecurrenceSizes fill_sizes(const Arguments& a) const {
    STD_TORCH_CHECK(a.w_ih.dim() == 2 && a.w_ih.size(0) % gates_of(a.cell) == 0, op_, ": w_ih must be [G H, I], got ",
                    shape_text(a.w_ih));
    RecurrenceSizes s;
    s.cell = a.cell;
    s.steps = static_cast<int64_t>(offsets_.size()) - 1;
    if (packed_) {
      STD_TORCH_CHECK(a.h0.has_value() && a.h0->dim() >= 2, op_, ": h0 must be [B, H] with batch_sizes");
      s.batch = s.steps > 0 ? offsets_[1] : a.h0->size(a.h0->dim() - 2);
    } else {
      s.batch = a.x.size(1);
    }
    s.input = a.w_ih.size(1);
    s.hidden = a.w_ih.size(0) / gates_of(a.cell);
    s.output = s.hidden;
    if (a.w_hr.has_value()) {
      STD_TORCH_CHECK(a.w_hr->dim() == 2 && a.w_hr->size(0) < s.hidden, op_, ": w_hr must be [P, H], P < H, got ",
                      shape_text(*a.w_hr));
      s.output = a.w_hr->size(0);
    }
    s.row_offsets = offsets_.data();
    s.reverse = a.reverse;
    return s;
  }

  const char* op_;
  std::vector<int64_t> offsets_;
  bool packed_;

 public:
  const RecurrenceSizes sizes;

 private:
  Tensor x_;
  Input<S> h0_;
  Input<S> c0_;
  Input<S> w_ih_;
  Input<S> w_hh_;
  Input<S> w_hr_;
  bool layer_state_;
};

// Results of a forward op; those that the op has not stay empty.
struct ForwardResults {
  Tensor y;
  Tensor h_n;
  OptionalTensor c_n;
  OptionalTensor kept;
};

ForwardResults forward(const Arguments& a, const OptionalTensor& b_ih, const OptionalTensor& b_hh, bool keep) {
  return with_type<float, double, BFloat16, Float16>(a.x, a.op, "x", [&](auto type) {
    using S = decltype(type);
    const Recurrence<S> r(a);
    const RecurrenceSizes& s = r.sizes;
    const Input<S> b_ih_in(b_ih, a.op, "b_ih", {r.gates()});
    const Input<S> b_hh_in(b_hh, a.op, "b_hh", {r.gates()});
    const Tensor y = r.empty_rows(s.output);
    const Output<S> h_n = r.state_output(true, s.output);
    std::optional<Output<S>> c_n;
    if (s.cell == Cell::kLstm) c_n.emplace(r.state_output(true, s.hidden));
    OptionalTensor kept;
    if (kept_blocks(s.cell, false) > 0) kept = r.empty_kept(keep);

    RecurrenceForwardParams<S> p = {s,
                                    r.x(),
                                    r.h0(),
                                    r.c0(),
                                    r.w_ih(),
                                    r.w_hh(),
                                    b_ih_in.get(),
                                    b_hh_in.get(),
                                    r.w_hr(),
                                    mutable_data<S>(y),
                                    h_n.get(),
                                    c_n ? c_n->get() : nullptr,
                                    keep ? mutable_data<S>(*kept) : nullptr,
                                    nullptr,
                                    nullptr};
    if (s.steps > 0) {
      launch_forward(p);
    } else {
      pass_state(s.batch * s.output, p.h0, p.h_n);
      pass_state(s.batch * s.hidden, p.c0, p.c_n);
    }
    return ForwardResults{y, h_n.tensor(), c_n ? OptionalTensor(c_n->tensor()) : std::nullopt, kept};
  });
}

// Which gradients are wanted.
struct Needs {
  bool dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr;
};

// Gradients; those that are not wanted have no elements.
struct BackwardResults {
  Tensor dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr;
};

BackwardResults backward(const Arguments& a, const OptionalTensor& grad_y, const OptionalTensor& grad_h_n,
                         const OptionalTensor& grad_c_n, const Tensor& y, const OptionalTensor& kept,
                         const Needs& need) {
  return with_type<float, double, BFloat16, Float16>(a.x, a.op, "x", [&](auto type) {
    using S = decltype(type);
    const Recurrence<S> r(a);
    const RecurrenceSizes& s = r.sizes;
    const Tensor y_dense = dense(r.checked_rows("y", y, s.output));
    OptionalTensor grad_y_dense;
    if (grad_y.has_value()) grad_y_dense = dense(r.checked_rows("grad_y", *grad_y, s.output));
    const Input<S> grad_h_n_in = r.state_input("grad_h_n", grad_h_n, s.output);
    const Input<S> grad_c_n_in = r.state_input("grad_c_n", grad_c_n, s.hidden);
    const int64_t kept_width = kept_blocks(s.cell, s.projected()) * s.hidden;
    const Input<S> kept_in(kept, a.op, "kept", {r.rows(), kept_width});

    const Output<S> none(false, {});
    const Tensor dx = need.dx ? r.empty_rows(s.input) : none.tensor();
    const Output<S> dh0 = r.state_output(need.dh0 && r.h0() != nullptr, s.output);
    const Output<S> dc0 = r.state_output(need.dc0 && r.c0() != nullptr, s.hidden);
    const Output<S> dw_ih(need.dw_ih, {r.gates(), s.input});
    const Output<S> dw_hh(need.dw_hh, {r.gates(), s.output});
    const Output<S> dw_hr(need.dw_hr && s.projected(), {s.output, s.hidden});
    const Output<S> db_ih(need.db_ih, {r.gates()});
    const Output<S> db_hh(need.db_hh, {r.gates()});

    const RecurrenceKernels<S>& kernel = kernels().recurrence<S>();
    const int threads = team_size(kernel.threads(s, max_threads()));
    const Tensor workspace = empty({kernel.backward_workspace(s, threads)}, kScalarType<Compute<S>>);
    const RecurrenceBackwardParams<S> p = {s,
                                           grad_y_dense ? data<S>(*grad_y_dense) : nullptr,
                                           grad_h_n_in.get(),
                                           grad_c_n_in.get(),
                                           r.x(),
                                           r.h0(),
                                           r.c0(),
                                           r.w_ih(),
                                           r.w_hh(),
                                           r.w_hr(),
                                           data<S>(y_dense),
                                           kept_in.get(),
                                           need.dx ? mutable_data<S>(dx) : nullptr,
                                           dh0.get(),
                                           dc0.get(),
                                           dw_ih.get(),
                                           dw_hh.get(),
                                           dw_hr.get(),
                                           db_ih.get(),
                                           db_hh.get(),
                                           mutable_data<Compute<S>>(workspace)};
    if (s.steps == 0) {
      pass_state(s.batch * s.output, p.grad_h_n, p.dh0);
      pass_state(s.batch * s.hidden, p.grad_c_n, p.dc0);
    }
    run_team(threads, [&](const Team& team) { kernel.backward(p, team); });
    return BackwardResults{
        dx, dh0.tensor(), dc0.tensor(), dw_ih.tensor(), dw_hh.tensor(), db_ih.tensor(), db_hh.tensor(), dw_hr.tensor()};
  });
}

std::tuple<Tensor, Tensor> rnn_forward(const Tensor& x, const OptionalTensor& h0, const Tensor& w_ih,
                                       const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                       const OptionalTensor& batch_sizes, const std::string& nonlinearity,
                                       bool reverse) {
  constexpr const char* kOp = "rnn_forward";
  const Arguments a = {kOp, elman_cell(kOp, nonlinearity), x, h0, kNone, w_ih, w_hh, kNone, batch_sizes, reverse};
  ForwardResults r = forward(a, b_ih, b_hh, false);
  return {std::move(r.y), std::move(r.h_n)};
}

std::tuple<Tensor, Tensor, Tensor> gru_forward(const Tensor& x, const OptionalTensor& h0, const Tensor& w_ih,
                                               const Tensor& w_hh, const OptionalTensor& b_ih,
                                               const OptionalTensor& b_hh, const OptionalTensor& batch_sizes,
                                               bool reverse, bool keep) {
  const Arguments a = {"gru_forward", Cell::kGru, x, h0, kNone, w_ih, w_hh, kNone, batch_sizes, reverse};
  ForwardResults r = forward(a, b_ih, b_hh, keep);
  return {std::move(r.y), std::move(r.h_n), std::move(*r.kept)};
}

void check_states(const char* op, const OptionalTensor& h0, const OptionalTensor& c0) {
  STD_TORCH_CHECK(h0.has_value() == c0.has_value(), op, ": h0 and c0 must be given together");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_forward(const Tensor& x, const OptionalTensor& h0,
                                                        const OptionalTensor& c0, const Tensor& w_ih,
                                                        const Tensor& w_hh, const OptionalTensor& b_ih,
                                                        const OptionalTensor& b_hh, const OptionalTensor& w_hr,
                                                        const OptionalTensor& batch_sizes, bool reverse, bool keep) {
  const Arguments a = {"lstm_forward", Cell::kLstm, x, h0, c0, w_ih, w_hh, w_hr, batch_sizes, reverse};
  check_states(a.op, h0, c0);
  ForwardResults r = forward(a, b_ih, b_hh, keep);
  return {std::move(r.y), std::move(r.h_n), std::move(*r.c_n), std::move(*r.kept)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rnn_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_h_n, const Tensor& x, const OptionalTensor& h0,
    const Tensor& w_ih, const Tensor& w_hh, const Tensor& y, const OptionalTensor& batch_sizes,
    const std::string& nonlinearity, bool reverse, bool need_dx, bool need_dh0, bool need_dw_ih, bool need_dw_hh,
    bool need_db_ih, bool need_db_hh) {
  constexpr const char* kOp = "rnn_backward";
  const Arguments a = {kOp, elman_cell(kOp, nonlinearity), x, h0, kNone, w_ih, w_hh, kNone, batch_sizes, reverse};
  const Needs need = {need_dx, need_dh0, false, need_dw_ih, need_dw_hh, need_db_ih, need_db_hh, false};
  BackwardResults r = backward(a, grad_y, grad_h_n, kNone, y, kNone, need);
  return {std::move(r.dx),    std::move(r.dh0),   std::move(r.dw_ih),
          std::move(r.dw_hh), std::move(r.db_ih), std::move(r.db_hh)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_h_n, const Tensor& x, const OptionalTensor& h0,
    const Tensor& w_ih, const Tensor& w_hh, const Tensor& y, const Tensor& kept, const OptionalTensor& batch_sizes,
    bool reverse, bool need_dx, bool need_dh0, bool need_dw_ih, bool need_dw_hh, bool need_db_ih, bool need_db_hh) {
  const Arguments a = {"gru_backward", Cell::kGru, x, h0, kNone, w_ih, w_hh, kNone, batch_sizes, reverse};
  const Needs need = {need_dx, need_dh0, false, need_dw_ih, need_dw_hh, need_db_ih, need_db_hh, false};
  BackwardResults r = backward(a, grad_y, grad_h_n, kNone, y, kept, need);
  return {std::move(r.dx),    std::move(r.dh0),   std::move(r.dw_ih),
          std::move(r.dw_hh), std::move(r.db_ih), std::move(r.db_hh)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n, const Tensor& x,
    const OptionalTensor& h0, const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
    const OptionalTensor& w_hr, const Tensor& y, const Tensor& kept, const OptionalTensor& batch_sizes, bool reverse,
    bool need_dx, bool need_dh0, bool need_dc0, bool need_dw_ih, bool need_dw_hh, bool need_db_ih, bool need_db_hh,
    bool need_dw_hr) {
  const Arguments a = {"lstm_backward", Cell::kLstm, x, h0, c0, w_ih, w_hh, w_hr, batch_sizes, reverse};
  check_states(a.op, h0, c0);
  const Needs need = {need_dx, need_dh0, need_dc0, need_dw_ih, need_dw_hh, need_db_ih, need_db_hh, need_dw_hr};
  BackwardResults r = backward(a, grad_y, grad_h_n, grad_c_n, y, kept, need);
  return {std::move(r.dx),    std::move(r.dh0),   std::move(r.dc0),   std::move(r.dw_ih),
          std::move(r.dw_hh), std::move(r.db_ih), std::move(r.db_hh), std::move(r.dw_hr)};
}

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CPU, m) {
  m.impl("rnn_forward", TORCH_BOX(&llm_ext::rnn_forward));
  m.impl("rnn_backward", TORCH_BOX(&llm_ext::rnn_backward));
  m.impl("gru_forward", TORCH_BOX(&llm_ext::gru_forward));
  m.impl("gru_backward", TORCH_BOX(&llm_ext::gru_backward));
  m.impl("lstm_forward", TORCH_BOX(&llm_ext::lstm_forward));
  m.impl("lstm_backward", TORCH_BOX(&llm_ext::lstm_backward));
}
