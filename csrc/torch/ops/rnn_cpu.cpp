// The recurrence on the CPU: allocate, fill, launch.
#include "cpu/kernels.h"
#include "torch/ops/rnn_launch_cpu.h"
#include "torch/ops/rnn.h"

namespace llm_ext {
namespace {

void refuse_lengths(const Arguments& a) {
  STD_TORCH_CHECK(!a.lengths.has_value(), a.op, ": lengths must be made batch_sizes on cpu");
}

struct Cpu {
  static ForwardResults forward(const Arguments& a, const OptionalTensor& b_ih, const OptionalTensor& b_hh, bool needs_autograd) {
    return with_type<float, double, BFloat16, Float16>(a.x, a.op, "x", [&](auto type) {
      using S = decltype(type);
      refuse_lengths(a);
      const Recurrence<S> r(a);
      const RecurrenceSizes& s = r.sizes;
      const Input<S> b_ih_in = r.input("b_ih", b_ih, {r.gates()});
      const Input<S> b_hh_in = r.input("b_hh", b_hh, {r.gates()});
      const Tensor y = r.empty_rows(s.output);
      const Output<S> h_n = r.state_output(true, s.output);
      std::optional<Output<S>> c_n;
      if (s.mode == Mode::kLstm) c_n.emplace(r.state_output(true, s.hidden));
      OptionalTensor saved;
      if (saved_blocks(s.mode, false) > 0) saved = r.empty_saved(needs_autograd);

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
                                      needs_autograd ? mutable_data<S>(*saved) : nullptr,
                                      nullptr,
                                      nullptr};
      if (s.steps > 0) {
        launch_forward(p);
      } else {
        pass_state(s.batch * s.output, p.h0, p.h_n);
        pass_state(s.batch * s.hidden, p.c0, p.c_n);
      }
      return ForwardResults{y, h_n.tensor(), c_n ? OptionalTensor(c_n->tensor()) : std::nullopt, saved};
    });
  }

  static BackwardResults backward(const Arguments& a, const OptionalTensor& grad_y, const OptionalTensor& grad_h_n,
                                  const OptionalTensor& grad_c_n, const Tensor& y, const OptionalTensor& saved,
                                  const Needs& need) {
    return with_type<float, double, BFloat16, Float16>(a.x, a.op, "x", [&](auto type) {
      using S = decltype(type);
      const Recurrence<S> r(a);
      const RecurrenceSizes& s = r.sizes;
      const Tensor y_dense = r.dense_rows("y", y, s.output);
      OptionalTensor grad_y_dense;
      if (grad_y.has_value()) grad_y_dense = r.dense_rows("grad_y", *grad_y, s.output);
      const Input<S> grad_h_n_in = r.state_input("grad_h_n", grad_h_n, s.output);
      const Input<S> grad_c_n_in = r.state_input("grad_c_n", grad_c_n, s.hidden);
      const int64_t saved_width = saved_blocks(s.mode, s.projected()) * s.hidden;
      const Input<S> saved_in = r.input("saved", saved, {r.rows(), saved_width});

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
                                             saved_in.get(),
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
      run_team(threads, [&](const ThreadTeam& team) { kernel.backward(p, team); });
      return BackwardResults{dx,
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

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CPU, m) {
  m.impl("rnn_forward", TORCH_BOX(&llm_ext::rnn_forward<llm_ext::Cpu>));
  m.impl("rnn_backward", TORCH_BOX(&llm_ext::rnn_backward<llm_ext::Cpu>));
  m.impl("gru_forward", TORCH_BOX(&llm_ext::gru_forward<llm_ext::Cpu>));
  m.impl("gru_backward", TORCH_BOX(&llm_ext::gru_backward<llm_ext::Cpu>));
  m.impl("lstm_forward", TORCH_BOX(&llm_ext::lstm_forward<llm_ext::Cpu>));
  m.impl("lstm_backward", TORCH_BOX(&llm_ext::lstm_backward<llm_ext::Cpu>));
}
