// rnn_*, gru_* and lstm_* on the CPU.
#include "torch/ops/rnn_cpu.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/kernels.h"
#include "torch/alloc/workspace.h"
#include "torch/ops/packed_lengths.h"
#include "torch/ops/rnn.h"
#include "torch/threads/run_team.h"
#include "torch/weight_cache/packed_rnn_weights.h"

namespace llm_ext {
namespace {

// Sets row offsets, `packed` and `workspace` of the params. The sequence must have at least one step.
template <typename S>
void run_forward(const CheckedRnnArguments<S>& args, RecurrenceForwardParams<S>& p) {
  const RecurrenceKernels<S>& kernel = kernels().recurrence<S>();
  const std::vector<int64_t> offsets = args.row_offsets();
  p.sizes.row_offsets = offsets.data();
  const int threads = team_size(kernel.threads(p.sizes, max_threads()));
  const Workspace<Compute<S>> workspace(kernel.forward_workspace(p.sizes, threads));
  p.workspace = workspace.get();
  const PackedRnnWeights<S> weights(p, threads);
  run_team(threads, [&](const ThreadTeam& team) {
    weights.pack(team);
    kernel.forward(p, team);
  });
  weights.insert_into_cache();
}

// Padded sequences with lengths run as packed rows. Their saved activations are those of the packed rows, followed by
// rows that nothing reads, because the shape of a result must not depend on the values of lengths.
struct RnnCpu {
  template <typename S>
  static Input<S> saved_input(const RnnBackwardArguments& a, const CheckedRnnArguments<S>& args) {
    if (a.saved == nullptr) return args.input("saved", kNone, {});
    args.check_saved(*a.saved);
    const RecurrenceSizes& s = args.sizes();
    return args.input("saved", *a.saved, {args.rows(), saved_blocks(s.mode, s.projected()) * s.hidden});
  }

  template <typename S>
  static RnnForwardResults forward_lengths(const RnnForwardArguments& a, const CheckedRnnArguments<S>& args) {
    const RecurrenceSizes& s = args.sizes();
    const bool lstm = s.mode == Mode::kLstm;
    const PackedLengths<S> packing(a.op, **a.lengths, args.steps(), s.batch);
    const Tensor x = packing.pack(args.x_tensor());
    const OptionalTensor batch_sizes = packing.batch_sizes();
    const OptionalTensor h0 = packing.pack_state(args.h0_tensor(), s.output);
    const OptionalTensor c0 = lstm ? OptionalTensor(packing.pack_state(args.c0_tensor(), s.hidden)) : kNone;
    RnnForwardArguments packed = a;
    packed.x = &x;
    packed.h0 = &h0;
    packed.c0 = &c0;
    packed.batch_sizes = &batch_sizes;
    packed.lengths = &kNone;
    const RnnForwardResults results = forward(packed);

    const Output<S> h_n = args.state_output(true, s.output);
    const Output<S> c_n = args.state_output(lstm, s.hidden);
    packing.pad_state(results.h_n, args.h0_tensor(), h_n.tensor());
    if (lstm) packing.pad_state(*results.c_n, args.c0_tensor(), c_n.tensor());
    OptionalTensor saved;
    if (results.saved.has_value()) {
      saved = args.empty_saved(a.needs_autograd);
      const int64_t size = results.saved->numel();
      std::copy_n(data<S>(*results.saved), size, mutable_data<S>(*saved));
    }
    return {packing.pad(results.y), h_n.tensor(), lstm ? OptionalTensor(c_n.tensor()) : std::nullopt, saved};
  }

  template <typename S>
  static RnnBackwardResults backward_lengths(const RnnBackwardArguments& a, const CheckedRnnArguments<S>& args) {
    const RecurrenceSizes& s = args.sizes();
    const Input<S> y_in = args.rows_input("y", *a.y, s.output);
    const Input<S> grad_y_in = args.rows_input("grad_y", *a.grad_y, s.output);
    const Input<S> grad_h_n_in = args.state_input("grad_h_n", *a.grad_h_n, s.output);
    const Input<S> grad_c_n_in = args.state_input("grad_c_n", *a.grad_c_n, s.hidden);
    const Input<S> all_saved = saved_input(a, args);
    const PackedLengths<S> packing(a.op, **a.lengths, args.steps(), s.batch);
    const auto pack_state = [&](const Input<S>& state, int64_t width) {
      return state.tensor().has_value() ? OptionalTensor(packing.pack_state(state.tensor(), width)) : kNone;
    };
    const Tensor x = packing.pack(args.x_tensor());
    const Tensor y = packing.pack(*y_in.tensor());
    const OptionalTensor batch_sizes = packing.batch_sizes();
    const OptionalTensor h0 = packing.pack_state(args.h0_tensor(), s.output);
    const OptionalTensor c0 =
        s.mode == Mode::kLstm ? OptionalTensor(packing.pack_state(args.c0_tensor(), s.hidden)) : kNone;
    const OptionalTensor grad_h_n = pack_state(grad_h_n_in, s.output);
    const OptionalTensor grad_c_n = pack_state(grad_c_n_in, s.hidden);
    OptionalTensor grad_y;
    if (a.grad_y->has_value()) grad_y = packing.pack(*grad_y_in.tensor());
    RnnBackwardArguments packed = a;
    OptionalTensor saved = all_saved.tensor();
    if (saved.has_value()) {
      saved = torch::stable::narrow(*saved, 0, 0, packing.rows());
      packed.saved = &*saved;
    }
    packed.x = &x;
    packed.y = &y;
    packed.h0 = &h0;
    packed.c0 = &c0;
    packed.grad_y = &grad_y;
    packed.grad_h_n = &grad_h_n;
    packed.grad_c_n = &grad_c_n;
    packed.batch_sizes = &batch_sizes;
    packed.lengths = &kNone;
    RnnBackwardResults results = backward(packed);

    if (a.need_dx) results.dx = packing.pad(results.dx);
    const Output<S> dh0 = args.state_output(a.need_dh0 && args.h0() != nullptr, s.output);
    const Output<S> dc0 = args.state_output(a.need_dc0 && args.c0() != nullptr, s.hidden);
    if (dh0.get() != nullptr) packing.pad_state(results.dh0, *a.grad_h_n, dh0.tensor());
    if (dc0.get() != nullptr) packing.pad_state(results.dc0, *a.grad_c_n, dc0.tensor());
    results.dh0 = dh0.tensor();
    results.dc0 = dc0.tensor();
    return results;
  }

  static RnnForwardResults forward(const RnnForwardArguments& a) {
    return with_type<float, double, BFloat16, Float16>(*a.x, a.op, "x", [&](auto type) {
      using S = decltype(type);
      const CheckedRnnArguments<S> args(a);
      const RecurrenceSizes& s = args.sizes();
      const Input<S> b_ih = args.input("b_ih", *a.b_ih, {args.gates()});
      const Input<S> b_hh = args.input("b_hh", *a.b_hh, {args.gates()});
      if (a.lengths->has_value()) return forward_lengths(a, args);
      const Tensor y = args.empty_rows(s.output);
      const Output<S> h_n = args.state_output(true, s.output);
      std::optional<Output<S>> c_n;
      if (s.mode == Mode::kLstm) c_n.emplace(args.state_output(true, s.hidden));
      OptionalTensor saved;
      if (saved_blocks(s.mode, false) > 0) saved = args.empty_saved(a.needs_autograd);

      RecurrenceForwardParams<S> p = {};
      p.sizes = s;
      p.x = args.x();
      p.h0 = args.h0();
      p.c0 = args.c0();
      p.w_ih = args.w_ih();
      p.w_hh = args.w_hh();
      p.b_ih = b_ih.get();
      p.b_hh = b_hh.get();
      p.w_hr = args.w_hr();
      p.y = mutable_data<S>(y);
      p.h_n = h_n.get();
      p.c_n = c_n ? c_n->get() : nullptr;
      p.saved = a.needs_autograd ? mutable_data<S>(*saved) : nullptr;
      if (s.steps > 0 && s.hidden > 0) {
        run_forward(args, p);
      } else {
        copy_state(s.batch * s.output, p.h0, p.h_n);
        copy_state(s.batch * s.hidden, p.c0, p.c_n);
      }
      return RnnForwardResults{y, h_n.tensor(), c_n ? OptionalTensor(c_n->tensor()) : std::nullopt, saved};
    });
  }

  static RnnBackwardResults backward(const RnnBackwardArguments& a) {
    return with_type<float, double, BFloat16, Float16>(*a.x, a.op, "x", [&](auto type) {
      using S = decltype(type);
      const CheckedRnnArguments<S> args(a);
      if (a.lengths->has_value()) return backward_lengths(a, args);
      const RecurrenceSizes& s = args.sizes();
      const Input<S> y = args.rows_input("y", *a.y, s.output);
      const Input<S> grad_y = args.rows_input("grad_y", *a.grad_y, s.output);
      const Input<S> grad_h_n = args.state_input("grad_h_n", *a.grad_h_n, s.output);
      const Input<S> grad_c_n = args.state_input("grad_c_n", *a.grad_c_n, s.hidden);
      const Input<S> saved = saved_input(a, args);

      const Output<S> none(false, {});
      const Tensor dx = a.need_dx ? args.empty_rows(s.input) : none.tensor();
      const Output<S> dh0 = args.state_output(a.need_dh0 && args.h0() != nullptr, s.output);
      const Output<S> dc0 = args.state_output(a.need_dc0 && args.c0() != nullptr, s.hidden);
      const Output<S> dw_ih(a.need_dw_ih, {args.gates(), s.input});
      const Output<S> dw_hh(a.need_dw_hh, {args.gates(), s.output});
      const Output<S> dw_hr(a.need_dw_hr && s.projected(), {s.output, s.hidden});
      const Output<S> db_ih(a.need_db_ih, {args.gates()});
      const Output<S> db_hh(a.need_db_hh, {args.gates()});

      RecurrenceBackwardParams<S> p = {};
      p.sizes = s;
      p.grad_y = grad_y.get();
      p.grad_h_n = grad_h_n.get();
      p.grad_c_n = grad_c_n.get();
      p.x = args.x();
      p.h0 = args.h0();
      p.c0 = args.c0();
      p.w_ih = args.w_ih();
      p.w_hh = args.w_hh();
      p.w_hr = args.w_hr();
      p.y = y.get();
      p.saved = saved.get();
      p.dx = a.need_dx ? mutable_data<S>(dx) : nullptr;
      p.dh0 = dh0.get();
      p.dc0 = dc0.get();
      p.dw_ih = dw_ih.get();
      p.dw_hh = dw_hh.get();
      p.dw_hr = dw_hr.get();
      p.db_ih = db_ih.get();
      p.db_hh = db_hh.get();
      if (s.steps == 0) {
        copy_state(s.batch * s.output, p.grad_h_n, p.dh0);
        copy_state(s.batch * s.hidden, p.grad_c_n, p.dc0);
      }
      if (any_elements(dx, dh0.tensor(), dc0.tensor(), dw_ih.tensor(), dw_hh.tensor(), dw_hr.tensor(), db_ih.tensor(),
                       db_hh.tensor())) {
        const RecurrenceKernels<S>& kernel = kernels().recurrence<S>();
        const std::vector<int64_t> offsets = args.row_offsets();
        p.sizes.row_offsets = offsets.data();
        const int threads = team_size(kernel.threads(p.sizes, max_threads()));
        const Workspace<Compute<S>> workspace(kernel.backward_workspace(p.sizes, threads));
        p.workspace = workspace.get();
        run_team(threads, [&](const ThreadTeam& team) { kernel.backward(p, team); });
      }
      return RnnBackwardResults{dx,
                                dh0.tensor(),
                                dc0.tensor(),
                                dw_ih.tensor(),
                                dw_hh.tensor(),
                                db_ih.tensor(),
                                db_hh.tensor(),
                                dw_hr.tensor()};
    });
  }
};

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CPU, m) { llm_ext::register_rnn_ops<llm_ext::RnnCpu>(m); }
