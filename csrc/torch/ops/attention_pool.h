// The ops of attention pooling and of its causal prefix form, as every backend has them: what their arguments are,
// checked, and what they return. A backend is a struct with four functions, forward, backward, prefix_forward and
// prefix_backward, that take filled params and the place of the tensors, fill in the workspace and launch.
#pragma once

#include <optional>
#include <tuple>

#include "params/attention.h"
#include "params/linear.h"
#include "params/pooling.h"
#include "params/rnn.h"
#include "torch/tensor_args.h"
#include "torch/stable.h"

namespace llm_ext {

// The scores come from u or are given; only the backward of prefix pooling needs neither.
inline void check_one_source(const char* op, const OptionalTensor& u, const OptionalTensor& scores) {
  STD_TORCH_CHECK(u.has_value() != scores.has_value(), op, ": exactly one of u and scores must be given");
}

// Everything the four ops have in common; keeps dense copies alive for the call.
template <typename S>
class PoolArguments {
 public:
  PoolArguments(const char* op, const Tensor& e, const OptionalTensor& u, const OptionalTensor& scores,
                const OptionalTensor& lengths, const OptionalTensor& mask)
      : place(place_of(e)),
        op_(op),
        e_(rows(e)),
        u_(input("u", u, {e.size(2)})),
        scores_(input("scores", scores, {e.size(0), e.size(1)})),
        lengths_(lengths, op, "lengths", {e.size(0)}, ScalarType::Long, place),
        mask_(mask, op, "mask", {e.size(0), e.size(1)}, ScalarType::Bool, place) {
    // A GPU's lengths stay on the device; its kernels take a wrong one as the nearest right one.
    for (int64_t b = 0; place.is_cpu() && lengths.has_value() && b < e.size(0); ++b) {
      const int64_t length = lengths_.get()[b];
      STD_TORCH_CHECK(length >= 0 && length <= e.size(1), op, ": lengths must be from 0 to ", e.size(1), ", got ",
                      length, " in row ", b);
    }
    in.batch = e.size(0);
    in.steps = e.size(1);
    in.dim = e.size(2);
    in.e = data<S>(e_);
    in.e_batch_stride = e_.stride(0);
    in.e_step_stride = e_.stride(1);
    in.u = u_.get();
    in.scores = scores_.get();
    in.lengths = lengths_.get();
    in.mask = mask_.get();
  }

  template <typename T = S>
  Input<T> input(const char* name, const OptionalTensor& t, std::initializer_list<int64_t> shape) const {
    return Input<T>(t, op_, name, shape, kScalarType<T>, place);
  }
  template <typename T = S>
  Output<T> output(bool wanted, std::initializer_list<int64_t> shape) const {
    return Output<T>(wanted, shape, place);
  }

  // A new tensor [B, T, D] laid out as e is.
  Tensor empty_like_e() const {
    const int64_t strides[] = {in.e_batch_stride, in.e_step_stride, 1};
    return empty_strided({in.batch, in.steps, in.dim}, strides, kScalarType<S>, place);
  }
  // The same, or nothing.
  Tensor wanted_like_e(bool wanted) const { return wanted ? empty_like_e() : empty({0}, kScalarType<S>, place); }

  // A tensor that must be laid out as e is.
  Tensor laid_out_as_e(const char* name, const Tensor& t) const {
    check_tensor(t, op_, name, kScalarType<S>, {in.batch, in.steps, in.dim}, place);
    if (in.batch * in.steps * in.dim == 0) return t;
    const bool same = (in.batch == 1 || t.stride(0) == in.e_batch_stride) &&
                      (in.steps == 1 || t.stride(1) == in.e_step_stride) && (in.dim == 1 || t.stride(2) == 1);
    if (same && lies_well(t)) return t;
    Tensor copy = empty_like_e();
    torch::stable::copy_(copy, t);
    return copy;
  }

  const Place place;
  PoolInput<S> in;

 private:
  // Whether the kernels can read it where it is.
  bool lies_well(const Tensor& t) const {
    return place.is_cpu() || reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  }
  // e as it is where [B, T, D] or [T, B, D] lies dense in memory; otherwise a copy.
  Tensor rows(const Tensor& e) const {
    STD_TORCH_CHECK(e.dim() == 3, op_, ": e must be [B, T, D], got ", shape_text(e));
    check_tensor(e, op_, "e", kScalarType<S>, {e.size(0), e.size(1), e.size(2)}, place);
    const int64_t B = e.size(0), D = e.size(2);
    const bool time_major = e.stride(2) == 1 && e.stride(0) == D && e.stride(1) == B * D;
    if (time_major && lies_well(e)) return e;
    return place.is_cpu() ? dense(e) : aligned(e);
  }

  const char* op_;
  Tensor e_;
  Input<S> u_;
  Input<S> scores_;
  Input<int64_t> lengths_;
  Input<bool> mask_;
};

template <typename Backend>
std::tuple<Tensor, Tensor> attention_pool_forward(const Tensor& e, const OptionalTensor& u,
                                                  const OptionalTensor& scores, const OptionalTensor& lengths,
                                                  const OptionalTensor& mask) {
  constexpr const char* kOp = "attention_pool_forward";
  return with_type<float, double, BFloat16, Float16>(e, kOp, "e", [&](auto type) {
    using S = decltype(type);
    using T = Compute<S>;
    check_one_source(kOp, u, scores);
    const PoolArguments<S> args(kOp, e, u, scores, lengths, mask);
    const Output<S> c = args.output(true, {args.in.batch, args.in.dim});
    const auto lse = args.template output<T>(true, {args.in.batch});
    PoolForwardParams<S> p = {args.in, c.get(), lse.get(), nullptr};
    Backend::forward(p, args.place);
    return std::make_tuple(c.tensor(), lse.tensor());
  });
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> attention_pool_backward(const OptionalTensor& grad_c, const OptionalTensor& grad_lse,
                                                           const Tensor& e, const OptionalTensor& u,
                                                           const OptionalTensor& scores, const OptionalTensor& lengths,
                                                           const OptionalTensor& mask, const Tensor& c,
                                                           const Tensor& lse, bool need_de, bool need_du,
                                                           bool need_dscores) {
  constexpr const char* kOp = "attention_pool_backward";
  return with_type<float, double, BFloat16, Float16>(e, kOp, "e", [&](auto type) {
    using S = decltype(type);
    using T = Compute<S>;
    check_one_source(kOp, u, scores);
    const PoolArguments<S> args(kOp, e, u, scores, lengths, mask);
    const PoolInput<S>& in = args.in;
    const Input<S> c_in = args.input("c", c, {in.batch, in.dim});
    const auto lse_in = args.template input<T>("lse", lse, {in.batch});
    const Input<S> grad_c_in = args.input("grad_c", grad_c, {in.batch, in.dim});
    const auto grad_lse_in = args.template input<T>("grad_lse", grad_lse, {in.batch});
    const Tensor de = args.wanted_like_e(need_de);
    const Output<S> du = args.output(need_du && u.has_value(), {in.dim});
    const Output<S> dscores = args.output(need_dscores && scores.has_value(), {in.batch, in.steps});
    PoolBackwardParams<S> p = {in,
                               c_in.get(),
                               lse_in.get(),
                               grad_c_in.get(),
                               grad_lse_in.get(),
                               need_de ? mutable_data<S>(de) : nullptr,
                               du.get(),
                               dscores.get(),
                               nullptr};
    Backend::backward(p, args.place);
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
    const PoolArguments<S> args(kOp, e, u, scores, lengths, mask);
    const PoolInput<S>& in = args.in;
    const auto l0_in = args.template input<T>("l0", l0, {in.batch});
    const auto c0_in = args.template input<T>("c0", c0, {in.batch, in.dim});
    const Tensor c = args.empty_like_e();
    const auto share = args.template output<T>(true, {in.batch, in.steps});
    const auto l_n = args.template output<T>(true, {in.batch});
    const auto c_n = args.template output<T>(true, {in.batch, in.dim});
    PrefixPoolForwardParams<S> p = {in,          l0_in.get(), c0_in.get(), mutable_data<S>(c),
                                    share.get(), l_n.get(),   c_n.get(),   nullptr};
    Backend::prefix_forward(p, args.place);
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
    const PoolArguments<S> args(kOp, e, u, {}, {}, {});
    const PoolInput<S>& in = args.in;
    const auto c0_in = args.template input<T>("c0", c0, {in.batch, in.dim});
    const Tensor c_rows = args.laid_out_as_e("c", c);
    const auto share_in = args.template input<T>("share", share, {in.batch, in.steps});
    const auto grad_l_n_in = args.template input<T>("grad_l_n", grad_l_n, {in.batch});
    const auto grad_c_n_in = args.template input<T>("grad_c_n", grad_c_n, {in.batch, in.dim});
    OptionalTensor grad;
    if (grad_c.has_value()) grad = args.laid_out_as_e("grad_c", *grad_c);
    const Tensor de = args.wanted_like_e(need_de);
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
    Backend::prefix_backward(p, args.place);
    return std::make_tuple(de, du.tensor(), dscores.tensor(), dl0.tensor(), dc0.tensor());
  });
}

}  // namespace llm_ext
