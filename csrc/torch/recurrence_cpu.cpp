// The recurrence on the CPU: check, allocate, fill, launch.
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "params.h"
#include "torch/check.h"
#include "torch/stable.h"

namespace llm_ext {
namespace {

Nonlinearity parse_nonlinearity(const char* op, const std::string& name) {
  if (name == "tanh") return Nonlinearity::kTanh;
  if (name == "relu") return Nonlinearity::kRelu;
  if (name == "sigmoid") return Nonlinearity::kSigmoid;
  STD_TORCH_CHECK(false, op, ": nonlinearity must be tanh, relu or sigmoid, got ", name);
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

template <typename T>
RecurrenceSizes<T> fill_sizes(const char* op, const std::vector<int64_t>& offsets, const Tensor& x, const Tensor& w_ih,
                              const OptionalTensor& h0, const OptionalTensor& batch_sizes,
                              const std::string& nonlinearity, bool reverse) {
  STD_TORCH_CHECK(w_ih.dim() == 2, op, ": w_ih must be [H, I], got ", shape_text(w_ih));
  RecurrenceSizes<T> s;
  s.steps = static_cast<int64_t>(offsets.size()) - 1;
  if (batch_sizes.has_value()) {
    STD_TORCH_CHECK(h0.has_value() && h0->dim() >= 2, op, ": h0 must be [B, H] with batch_sizes");
    s.batch = s.steps > 0 ? offsets[1] : h0->size(h0->dim() - 2);
  } else {
    s.batch = x.size(1);
  }
  s.input = w_ih.size(1);
  s.hidden = w_ih.size(0);
  s.row_offsets = offsets.data();
  s.nonlinearity = parse_nonlinearity(op, nonlinearity);
  s.reverse = reverse;
  return s;
}

// x and y are [T, B, *] or, packed, [N, *].
template <typename T>
void check_rows(const char* op, const char* name, const Tensor& t, const RecurrenceSizes<T>& s, bool packed,
                int64_t width) {
  if (packed) {
    check_tensor(t, op, name, kScalarType<T>, {s.row_offsets[s.steps], width});
  } else {
    check_tensor(t, op, name, kScalarType<T>, {s.steps, s.batch, width});
  }
}

template <typename T>
Tensor empty_rows(const RecurrenceSizes<T>& s, bool packed, int64_t width) {
  if (packed) return empty({s.row_offsets[s.steps], width}, kScalarType<T>);
  return empty({s.steps, s.batch, width}, kScalarType<T>);
}

// A state is [B, H], or [1, B, H] as torch.nn lays out the state of one layer; results take the shape of h0.
template <typename T>
Input<T> state_input(const OptionalTensor& t, const char* op, const char* name, const RecurrenceSizes<T>& s) {
  if (t.has_value() && t->dim() == 3) return Input<T>(t, op, name, {1, s.batch, s.hidden});
  return Input<T>(t, op, name, {s.batch, s.hidden});
}

template <typename T>
Output<T> state_output(bool wanted, const OptionalTensor& h0, const RecurrenceSizes<T>& s) {
  if (h0.has_value() && h0->dim() == 3) return Output<T>(wanted, {1, s.batch, s.hidden});
  return Output<T>(wanted, {s.batch, s.hidden});
}

// The state of a sequence of no steps is what it started from; likewise its gradient.
template <typename T>
void pass_state(const RecurrenceSizes<T>& s, const T* from, T* to) {
  if (from != nullptr) {
    std::memcpy(to, from, s.batch * s.hidden * sizeof(T));
  } else {
    std::memset(to, 0, s.batch * s.hidden * sizeof(T));
  }
}

std::tuple<Tensor, Tensor> rnn_forward(const Tensor& x, const OptionalTensor& h0, const Tensor& w_ih,
                                       const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                       const OptionalTensor& batch_sizes, const std::string& nonlinearity,
                                       bool reverse) {
  constexpr const char* kOp = "rnn_forward";
  return with_type(x, kOp, "x", [&](auto type) {
    using T = decltype(type);
    const bool packed = batch_sizes.has_value();
    const std::vector<int64_t> offsets = row_offsets(kOp, x, batch_sizes);
    const auto s = fill_sizes<T>(kOp, offsets, x, w_ih, h0, batch_sizes, nonlinearity, reverse);
    check_rows(kOp, "x", x, s, packed, s.input);
    const Tensor x_dense = dense(x);
    const Input<T> h0_in = state_input(h0, kOp, "h0", s);
    const Input<T> w_ih_in(w_ih, kOp, "w_ih", {s.hidden, s.input});
    const Input<T> w_hh_in(w_hh, kOp, "w_hh", {s.hidden, s.hidden});
    const Input<T> b_ih_in(b_ih, kOp, "b_ih", {s.hidden});
    const Input<T> b_hh_in(b_hh, kOp, "b_hh", {s.hidden});
    const Tensor y = empty_rows(s, packed, s.hidden);
    const Output<T> h_n = state_output(true, h0, s);

    const KernelsOf<T>& kernel = kernels().of<T>();
    const int threads = kernel.rnn_threads(s, max_threads());
    const int64_t space = kernel.rnn_forward_workspace(s);
    std::optional<Tensor> workspace;
    if (space > 0) workspace = empty({space}, kScalarType<T>);
    const RnnForwardParams<T> p = {s,
                                   data<T>(x_dense),
                                   h0_in.get(),
                                   w_ih_in.get(),
                                   w_hh_in.get(),
                                   b_ih_in.get(),
                                   b_hh_in.get(),
                                   mutable_data<T>(y),
                                   h_n.get(),
                                   workspace ? mutable_data<T>(*workspace) : nullptr};
    if (s.steps == 0) {
      pass_state(s, p.h0, p.h_n);
    } else {
      run_team(threads, [&](const Team& team) { kernel.rnn_forward(p, team); });
    }
    return std::make_tuple(y, h_n.tensor());
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_h_n, const Tensor& x, const OptionalTensor& h0,
    const Tensor& w_ih, const Tensor& w_hh, const Tensor& y, const OptionalTensor& batch_sizes,
    const std::string& nonlinearity, bool reverse, bool need_dx, bool need_dh0, bool need_dw_ih, bool need_dw_hh,
    bool need_db) {
  constexpr const char* kOp = "rnn_backward";
  return with_type(x, kOp, "x", [&](auto type) {
    using T = decltype(type);
    const bool packed = batch_sizes.has_value();
    const std::vector<int64_t> offsets = row_offsets(kOp, x, batch_sizes);
    const auto s = fill_sizes<T>(kOp, offsets, x, w_ih, h0, batch_sizes, nonlinearity, reverse);
    check_rows(kOp, "x", x, s, packed, s.input);
    check_rows(kOp, "y", y, s, packed, s.hidden);
    if (grad_y.has_value()) check_rows(kOp, "grad_y", *grad_y, s, packed, s.hidden);
    const Tensor x_dense = dense(x);
    const Tensor y_dense = dense(y);
    const OptionalTensor grad_y_dense = grad_y.has_value() ? OptionalTensor(dense(*grad_y)) : std::nullopt;
    const Input<T> grad_h_n_in = state_input(grad_h_n, kOp, "grad_h_n", s);
    const Input<T> h0_in = state_input(h0, kOp, "h0", s);
    const Input<T> w_ih_in(w_ih, kOp, "w_ih", {s.hidden, s.input});
    const Input<T> w_hh_in(w_hh, kOp, "w_hh", {s.hidden, s.hidden});

    const Output<T> dx(false, {});
    const Tensor dx_tensor = need_dx ? empty_rows(s, packed, s.input) : dx.tensor();
    const Output<T> dh0 = state_output(need_dh0, h0, s);
    const Output<T> dw_ih(need_dw_ih, {s.hidden, s.input});
    const Output<T> dw_hh(need_dw_hh, {s.hidden, s.hidden});
    const Output<T> db(need_db, {s.hidden});
    const Tensor dz = empty_rows(s, packed, s.hidden);

    const KernelsOf<T>& kernel = kernels().of<T>();
    const int threads = kernel.rnn_threads(s, max_threads());
    const Tensor workspace = empty({kernel.rnn_backward_workspace(s, threads)}, kScalarType<T>);
    const RnnBackwardParams<T> p = {s,
                                    grad_y_dense.has_value() ? data<T>(*grad_y_dense) : nullptr,
                                    grad_h_n_in.get(),
                                    data<T>(x_dense),
                                    h0_in.get(),
                                    w_ih_in.get(),
                                    w_hh_in.get(),
                                    data<T>(y_dense),
                                    mutable_data<T>(dz),
                                    need_dx ? mutable_data<T>(dx_tensor) : nullptr,
                                    dh0.get(),
                                    dw_ih.get(),
                                    dw_hh.get(),
                                    db.get(),
                                    mutable_data<T>(workspace)};
    if (s.steps == 0 && need_dh0) pass_state(s, p.grad_h_n, p.dh0);
    run_team(threads, [&](const Team& team) { kernel.rnn_backward(p, team); });
    return std::make_tuple(dx_tensor, dh0.tensor(), dw_ih.tensor(), dw_hh.tensor(), db.tensor());
  });
}

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CPU, m) {
  m.impl("rnn_forward", TORCH_BOX(&llm_ext::rnn_forward));
  m.impl("rnn_backward", TORCH_BOX(&llm_ext::rnn_backward));
}
