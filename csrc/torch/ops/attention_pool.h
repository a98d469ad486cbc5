// The ops attention_pool_* and prefix_pool_*, as every backend has them: arguments, checks, results.
//
// A backend is a struct with
//   static void check_sizes(const char* op, std::initializer_list<int64_t>);
// which throws if a size is too large for its kernels, and four functions, for each type S that tensors are stored as,
//   static void forward(PoolForwardParams<S>&, const Device&);
//   static void backward(PoolBackwardParams<S>&, const Device&);
//   static void prefix_forward(PrefixPoolForwardParams<S>&, const Device&);
//   static void prefix_backward(PrefixPoolBackwardParams<S>&, const Device&);
// which set the workspace of the params and run the kernel.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <tuple>

#include "params/pooling.h"
#include "torch/alloc/empty.h"
#include "torch/device.h"
#include "torch/dtypes.h"
#include "torch/stable.h"
#include "torch/tensor.h"
#include "torch/tensor_args.h"

namespace llm_ext {

// Scores are e . u or given. Only the backward pass of prefix pooling needs neither.
inline void check_one_source(const char* op, const OptionalTensor& u, const OptionalTensor& scores) {
  STD_TORCH_CHECK(u.has_value() != scores.has_value(), op, ": exactly one of u and scores must be given");
}

// Tensors [B, 2] as the LogSum of each row.
template <typename T>
const LogSum<T>* log_sums(const Input<T>& l) {
  return reinterpret_cast<const LogSum<T>*>(l.get());
}
template <typename T>
class LogSums {
 public:
  LogSums(int64_t batch, const Device& device) : l_(true, {batch, 2}, device) {}
  LogSum<T>* get() const { return reinterpret_cast<LogSum<T>*>(l_.get()); }
  const Tensor& tensor() const { return l_.tensor(); }

 private:
  Output<T> l_;
};

// Checked sizes and inputs of the four ops. Owns dense copies, which in() makes, for the duration of the call.
template <typename S>
class CheckedPoolArguments {
 public:
  CheckedPoolArguments(const char* op, const Tensor& e, const OptionalTensor& u, const OptionalTensor& scores,
                       const OptionalTensor& lengths, const OptionalTensor& mask)
      : op_(op),
        device_(device_of(e)),
        u_(input("u", u, {checked(e).size(2)})),
        scores_(input("scores", scores, {e.size(0), e.size(1)})),
        lengths_(lengths, op, "lengths", {e.size(0)}, device_),
        mask_(mask, op, "mask", {e.size(0), e.size(1)}, device_),
        e_(e) {
    if (lengths.has_value()) check_lengths(*lengths, op, "lengths", e.size(1));
    in_.batch = e.size(0);
    in_.steps = e.size(1);
    in_.dim = e.size(2);
  }

  const Device& device() const { return device_; }
  // Without pointers and strides.
  const PoolInput<S>& sizes() const { return in_; }

  // After all checks of the call, and before the functions below that need the strides of e.
  const PoolInput<S>& in() {
    e_ = dense_rows(e_);
    in_.e = data<S>(e_);
    in_.e_batch_stride = e_.stride(0);
    in_.e_step_stride = e_.stride(1);
    in_.u = u_.get();
    in_.scores = scores_.get();
    in_.lengths = lengths_.get();
    in_.mask = mask_.get();
    return in_;
  }

  template <typename T = S>
  Input<T> input(const char* name, const OptionalTensor& t, std::initializer_list<int64_t> shape) const {
    return Input<T>(t, op_, name, shape, device_);
  }
  template <typename T = S>
  Output<T> output(bool wanted, std::initializer_list<int64_t> shape) const {
    return Output<T>(wanted, shape, device_);
  }

  // A new tensor [B, T, D] with the strides of e.
  Tensor empty_like_e() const {
    const int64_t strides[] = {in_.e_batch_stride, in_.e_step_stride, 1};
    return empty_strided({in_.batch, in_.steps, in_.dim}, strides, kScalarType<S>, device_);
  }
  // Without elements if it is not wanted.
  Tensor empty_like_e_if(bool wanted) const { return wanted ? empty_like_e() : empty({0}, kScalarType<S>, device_); }

  void check_like_e(const char* name, const Tensor& t) const {
    check_tensor(t, op_, name, kScalarType<S>, {in_.batch, in_.steps, in_.dim}, device_);
  }
  // t, or a copy of it that has the strides of e.
  Tensor strided_like_e(const Tensor& t) const {
    if (in_.batch * in_.steps * in_.dim == 0) return t;
    const bool same = (in_.batch == 1 || t.stride(0) == in_.e_batch_stride) &&
                      (in_.steps == 1 || t.stride(1) == in_.e_step_stride) && (in_.dim == 1 || t.stride(2) == 1);
    if (same && is_aligned_for_device(t)) return t;
    Tensor copy = empty_like_e();
    torch::stable::copy_(copy, t);
    return copy;
  }

 private:
  bool is_aligned_for_device(const Tensor& t) const { return device_.is_cpu() || is_aligned(t, 16); }

  const Tensor& checked(const Tensor& e) const {
    STD_TORCH_CHECK(e.dim() == 3, op_, ": e must be [B, T, D], got ", shape_text(e));
    check_tensor(e, op_, "e", kScalarType<S>, {e.size(0), e.size(1), e.size(2)}, device_);
    return e;
  }

  // e itself if it is contiguous as [B, T, D] or as [T, B, D], otherwise a copy.
  Tensor dense_rows(const Tensor& e) const {
    const int64_t B = e.size(0), D = e.size(2);
    const bool time_major = e.stride(2) == 1 && e.stride(0) == D && e.stride(1) == B * D;
    if (time_major && is_aligned_for_device(e)) return e;
    return device_.is_cpu() ? dense(e) : aligned(e);
  }

  // In this order: each is initialized from those above it.
  const char* op_;
  const Device device_;
  const Input<S> u_;
  const Input<S> scores_;
  const Input<int64_t> lengths_;
  const Input<bool> mask_;
  Tensor e_;
  PoolInput<S> in_{};
};

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> attention_pool_forward(const Tensor& e, const OptionalTensor& u,
                                                          const OptionalTensor& scores, const OptionalTensor& lengths,
                                                          const OptionalTensor& mask) {
  constexpr const char* kOp = "attention_pool_forward";
  return with_type<float, double, BFloat16, Float16>(e, kOp, "e", [&](auto type) {
    using S = decltype(type);
    using T = Compute<S>;
    check_one_source(kOp, u, scores);
    CheckedPoolArguments<S> args(kOp, e, u, scores, lengths, mask);
    const PoolInput<S>& s = args.sizes();
    Backend::check_sizes(kOp, {s.batch, s.steps, s.dim});
    const PoolInput<S>& in = args.in();
    const Output<S> c = args.output(true, {in.batch, in.dim});
    const auto lse = args.template output<T>(true, {in.batch});
    const LogSums<T> l(in.batch, args.device());
    PoolForwardParams<S> p = {in, c.get(), lse.get(), l.get(), nullptr};
    if (any_elements(lse.tensor())) Backend::forward(p, args.device());
    return std::make_tuple(c.tensor(), lse.tensor(), l.tensor());
  });
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> attention_pool_backward(const OptionalTensor& grad_c, const OptionalTensor& grad_lse,
                                                           const Tensor& e, const OptionalTensor& u,
                                                           const OptionalTensor& scores, const OptionalTensor& lengths,
                                                           const OptionalTensor& mask, const Tensor& c, const Tensor& l,
                                                           bool need_de, bool need_du, bool need_dscores) {
  constexpr const char* kOp = "attention_pool_backward";
  return with_type<float, double, BFloat16, Float16>(e, kOp, "e", [&](auto type) {
    using S = decltype(type);
    using T = Compute<S>;
    check_one_source(kOp, u, scores);
    CheckedPoolArguments<S> args(kOp, e, u, scores, lengths, mask);
    const PoolInput<S>& s = args.sizes();
    Backend::check_sizes(kOp, {s.batch, s.steps, s.dim});
    const Input<S> c_in = args.input("c", c, {s.batch, s.dim});
    const auto l_in = args.template input<T>("l", l, {s.batch, 2});
    const Input<S> grad_c_in = args.input("grad_c", grad_c, {s.batch, s.dim});
    const auto grad_lse_in = args.template input<T>("grad_lse", grad_lse, {s.batch});
    const PoolInput<S>& in = args.in();
    const Tensor de = args.empty_like_e_if(need_de);
    const Output<S> du = args.output(need_du && u.has_value(), {in.dim});
    const Output<S> dscores = args.output(need_dscores && scores.has_value(), {in.batch, in.steps});
    PoolBackwardParams<S> p = {in,
                               c_in.get(),
                               log_sums(l_in),
                               grad_c_in.get(),
                               grad_lse_in.get(),
                               need_de ? mutable_data<S>(de) : nullptr,
                               du.get(),
                               dscores.get(),
                               nullptr};
    if (any_elements(de, du.tensor(), dscores.tensor())) Backend::backward(p, args.device());
    return std::make_tuple(de, du.tensor(), dscores.tensor());
  });
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> prefix_pool_forward(const Tensor& e, const OptionalTensor& u,
                                                               const OptionalTensor& scores,
                                                               const OptionalTensor& lengths,
                                                               const OptionalTensor& mask, const OptionalTensor& l0,
                                                               const OptionalTensor& c0) {
  constexpr const char* kOp = "prefix_pool_forward";
  return with_type<float, double, BFloat16, Float16>(e, kOp, "e", [&](auto type) {
    using S = decltype(type);
    using T = Compute<S>;
    check_one_source(kOp, u, scores);
    STD_TORCH_CHECK(l0.has_value() == c0.has_value(), kOp, ": l0 and c0 must be given together");
    CheckedPoolArguments<S> args(kOp, e, u, scores, lengths, mask);
    const PoolInput<S>& s = args.sizes();
    Backend::check_sizes(kOp, {s.batch, s.steps, s.dim});
    const auto l0_in = args.template input<T>("l0", l0, {s.batch, 2});
    const auto c0_in = args.template input<T>("c0", c0, {s.batch, s.dim});
    const PoolInput<S>& in = args.in();
    const Tensor c = args.empty_like_e();
    const auto share = args.template output<T>(true, {in.batch, in.steps});
    const LogSums<T> l_n(in.batch, args.device());
    const auto c_n = args.template output<T>(true, {in.batch, in.dim});
    PrefixPoolForwardParams<S> p = {in,          log_sums(l0_in), c0_in.get(), mutable_data<S>(c),
                                    share.get(), l_n.get(),       c_n.get(),   nullptr};
    if (any_elements(l_n.tensor())) Backend::prefix_forward(p, args.device());
    return std::make_tuple(c, share.tensor(), l_n.tensor(), c_n.tensor());
  });
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prefix_pool_backward(
    const OptionalTensor& grad_c, const OptionalTensor& grad_l_n, const OptionalTensor& grad_c_n, const Tensor& e,
    const OptionalTensor& u, const OptionalTensor& c0, const Tensor& c, const Tensor& share, bool need_de, bool need_du,
    bool need_dscores, bool need_dstate) {
  constexpr const char* kOp = "prefix_pool_backward";
  return with_type<float, double, BFloat16, Float16>(e, kOp, "e", [&](auto type) {
    using S = decltype(type);
    using T = Compute<S>;
    CheckedPoolArguments<S> args(kOp, e, u, {}, {}, {});
    const PoolInput<S>& s = args.sizes();
    Backend::check_sizes(kOp, {s.batch, s.steps, s.dim});
    const auto c0_in = args.template input<T>("c0", c0, {s.batch, s.dim});
    args.check_like_e("c", c);
    const auto share_in = args.template input<T>("share", share, {s.batch, s.steps});
    const auto grad_l_n_in = args.template input<T>("grad_l_n", grad_l_n, {s.batch});
    const auto grad_c_n_in = args.template input<T>("grad_c_n", grad_c_n, {s.batch, s.dim});
    if (grad_c.has_value()) args.check_like_e("grad_c", *grad_c);
    const PoolInput<S>& in = args.in();
    const Tensor c_rows = args.strided_like_e(c);
    const OptionalTensor grad = grad_c.has_value() ? OptionalTensor(args.strided_like_e(*grad_c)) : std::nullopt;
    const Tensor de = args.empty_like_e_if(need_de);
    const Output<S> du = args.output(need_du, {in.dim});
    const Output<S> dscores = args.output(need_dscores, {in.batch, in.steps});
    const auto dl0 = args.template output<T>(need_dstate, {in.batch});
    const auto dc0 = args.template output<T>(need_dstate, {in.batch, in.dim});
    PrefixPoolBackwardParams<S> p = {in,
                                     c0_in.get(),
                                     data<S>(c_rows),
                                     share_in.get(),
                                     grad.has_value() ? data<S>(*grad) : nullptr,
                                     grad_l_n_in.get(),
                                     grad_c_n_in.get(),
                                     need_de ? mutable_data<S>(de) : nullptr,
                                     du.get(),
                                     dscores.get(),
                                     dl0.get(),
                                     dc0.get(),
                                     nullptr};
    // Without positions only the gradients of a state may have elements; rows without positions take no memory.
    if ((in.batch == 0 || in.steps == 0) && !need_dstate) {
      for (Tensor t : {de, du.tensor(), dscores.tensor()}) torch::stable::zero_(t);
    } else {
      Backend::prefix_backward(p, args.device());
    }
    return std::make_tuple(de, du.tensor(), dscores.tensor(), dl0.tensor(), dc0.tensor());
  });
}

}  // namespace llm_ext
