// The schema of every op. Fake kernels, autograd and autocast are in llm_ext/ops/<family>.py. "need_d*" say which
// gradients to compute; the others are returned without elements.
#include "torch/stable.h"

STABLE_TORCH_LIBRARY(llm_ext, m) {
  // One direction of one layer: llm_ext/ops/recurrence.py. x is [T, B, I], or packed rows [N, I] with batch_sizes.
  m.def(
      "rnn_forward(Tensor x, Tensor? h0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor? batch_sizes, Tensor? lengths, str nonlinearity, bool reverse, bool tf32) -> (Tensor y, Tensor h_n)");
  m.def(
      "rnn_backward(Tensor? grad_y, Tensor? grad_h_n, Tensor x, Tensor? h0, Tensor w_ih, Tensor w_hh, Tensor y, "
      "Tensor? batch_sizes, Tensor? lengths, str nonlinearity, bool reverse, bool tf32, "
      "bool need_dx, bool need_dh0, bool need_dw_ih, bool need_dw_hh, bool need_db_ih, bool need_db_hh) -> "
      "(Tensor dx, Tensor dh0, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh)");
  m.def(
      "gru_forward(Tensor x, Tensor? h0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor? batch_sizes, Tensor? lengths, bool reverse, bool tf32, bool needs_autograd) -> "
      "(Tensor y, Tensor h_n, Tensor saved)");
  m.def(
      "gru_backward(Tensor? grad_y, Tensor? grad_h_n, Tensor x, Tensor? h0, Tensor w_ih, Tensor w_hh, Tensor y, "
      "Tensor saved, Tensor? batch_sizes, Tensor? lengths, bool reverse, bool tf32, "
      "bool need_dx, bool need_dh0, bool need_dw_ih, bool need_dw_hh, bool need_db_ih, bool need_db_hh) -> "
      "(Tensor dx, Tensor dh0, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh)");
  m.def(
      "lstm_forward(Tensor x, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor? w_hr, Tensor? batch_sizes, Tensor? lengths, bool reverse, bool tf32, bool needs_autograd) -> "
      "(Tensor y, Tensor h_n, Tensor c_n, Tensor saved)");
  m.def(
      "lstm_backward(Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, Tensor x, Tensor? h0, Tensor? c0, "
      "Tensor w_ih, Tensor w_hh, Tensor? w_hr, Tensor y, Tensor saved, Tensor? batch_sizes, Tensor? lengths, "
      "bool reverse, bool tf32, bool need_dx, bool need_dh0, bool need_dc0, bool need_dw_ih, bool need_dw_hh, "
      "bool need_db_ih, bool need_db_hh, bool need_dw_hr) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, "
      "Tensor dw_hh, Tensor db_ih, Tensor db_hh, Tensor dw_hr)");

  // Both directions of one layer (CUDA), and all layers, for inference: llm_ext/ops/recurrence.py.
  m.def(
      "bidirectional_forward(str mode, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, bool bias, "
      "Tensor? batch_sizes, Tensor? lengths, bool tf32, bool needs_autograd) -> "
      "(Tensor y, Tensor h_n, Tensor c_n, Tensor saved)");
  m.def(
      "bidirectional_backward(Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, str mode, Tensor x, Tensor? h0, "
      "Tensor? c0, Tensor[] weights, bool bias, Tensor y, Tensor saved, Tensor? batch_sizes, Tensor? lengths, "
      "bool tf32, bool need_dx, bool need_dh0, bool need_dc0, bool need_dweights) -> "
      "(Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)");
  m.def(
      "multilayer_rnn_forward(str mode, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, bool bias, "
      "bool bidirectional, Tensor[] input_projections, Tensor? batch_sizes, bool tf32) -> "
      "(Tensor y, Tensor h_n, Tensor c_n)");

  // The linear system of the tangents of one direction, and its transpose, on rows [N, *]:
  // llm_ext/ops/_recurrence_derivatives.py.
  m.def(
      "recurrence_tangent(str mode, Tensor w_hh, Tensor? w_hr, Tensor? saved, Tensor y, Tensor h0, Tensor? c0, "
      "Tensor? v_a, Tensor? v_h, Tensor? v_c, Tensor? tangent_h0, Tensor? tangent_c0, Tensor batch_sizes, "
      "bool reverse) -> (Tensor a, Tensor h, Tensor c)");
  m.def(
      "recurrence_adjoint(str mode, Tensor w_hh, Tensor? w_hr, Tensor? saved, Tensor y, Tensor h0, Tensor? c0, "
      "Tensor? g_a, Tensor? g_h, Tensor? g_c, Tensor? g_saved, Tensor batch_sizes, bool reverse) -> "
      "(Tensor a, Tensor h, Tensor c, Tensor dh0, Tensor dc0)");
  m.def(
      "recurrence_curvature(str mode, Tensor w_hh, Tensor? w_hr, Tensor? saved, Tensor y, Tensor h0, Tensor? c0, "
      "Tensor a, Tensor? state, Tensor? state0, Tensor adjoint_h, Tensor? adjoint_c, Tensor batch_sizes, "
      "bool reverse) -> (Tensor d_saved, Tensor d_y, Tensor d_state0)");

  // llm_ext/ops/linear.py
  m.def("linear_forward(Tensor x, Tensor w, Tensor? b) -> Tensor y");
  m.def(
      "linear_backward(Tensor grad_y, Tensor x, Tensor w, bool need_dx, bool need_dw, bool need_db) -> "
      "(Tensor dx, Tensor dw, Tensor db)");
  m.def("linear_argmax(Tensor x, Tensor w, Tensor? b) -> Tensor");

  // Weights of 8 or 16 bits, packed as csrc/params/quantized.h says: llm_ext/ops/quantization.py. Scales are those of
  // int8 weights; bfloat16 weights are passed as int16.
  m.def(
      "quantized_rnn_forward(str mode, Tensor x, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor? s_ih, Tensor w_hh, "
      "Tensor? s_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? s_hr, Tensor? batch_sizes, Tensor? lengths, "
      "int input, int hidden, int output, bool reverse) -> (Tensor y, Tensor h_n, Tensor c_n)");
  m.def("quantized_linear_forward(Tensor x, Tensor w, Tensor? scale, Tensor? b, int input, int output) -> Tensor y");

  // llm_ext/ops/pooling.py. l, l0 and l_n are [B, 2]: the largest score and the sum of exponentials relative to it.
  m.def(
      "attention_pool_forward(Tensor e, Tensor? u, Tensor? scores, Tensor? lengths, Tensor? mask) -> "
      "(Tensor c, Tensor lse, Tensor l)");
  m.def(
      "attention_pool_backward(Tensor? grad_c, Tensor? grad_lse, Tensor e, Tensor? u, Tensor? scores, "
      "Tensor? lengths, Tensor? mask, Tensor c, Tensor l, bool need_de, bool need_du, bool need_dscores) -> "
      "(Tensor de, Tensor du, Tensor dscores)");
  m.def(
      "prefix_pool_forward(Tensor e, Tensor? u, Tensor? scores, Tensor? lengths, Tensor? mask, Tensor? l0, "
      "Tensor? c0) -> (Tensor c, Tensor share, Tensor l_n, Tensor c_n)");
  m.def(
      "prefix_pool_backward(Tensor? grad_c, Tensor? grad_l_n, Tensor? grad_c_n, Tensor e, Tensor? u, Tensor? c0, "
      "Tensor c, Tensor share, bool need_de, bool need_du, bool need_dscores, bool need_dstate) -> "
      "(Tensor de, Tensor du, Tensor dscores, Tensor dl0, Tensor dc0)");

  // llm_ext/ops/attention.py
  m.def(
      "additive_attention_forward(Tensor query, Tensor keys, Tensor v, Tensor values, Tensor? key_lengths, "
      "Tensor? mask, bool need_weights) -> (Tensor context, Tensor weights)");
  m.def(
      "additive_attention_backward(Tensor? grad_context, Tensor? grad_weights, Tensor query, Tensor keys, Tensor v, "
      "Tensor values, Tensor? key_lengths, Tensor? mask, "
      "bool need_dquery, bool need_dkeys, bool need_dv, bool need_dvalues) -> "
      "(Tensor dquery, Tensor dkeys, Tensor dv, Tensor dvalues)");
  m.def(
      "attention_step(str mode, Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, bool bias, "
      "Tensor? input_projection, Tensor w_query, Tensor keys, Tensor v, Tensor values, Tensor? key_lengths, "
      "Tensor w_out, Tensor? b_out) -> (Tensor out, Tensor h_n, Tensor c_n)");

  // Without tensors: llm_ext/_C.py.
  m.def("build_info() -> (str compiler, str torch, str? cuda, bool openmp, str isa)");
  m.def("packed_weight_cache_bytes() -> int");
  m.def("clear_packed_weight_cache() -> ()");
  m.def("cpu_cache_bytes() -> int");
  m.def("empty_cpu_cache() -> ()");
}
