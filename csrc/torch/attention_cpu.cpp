// Attention pooling and its causal prefix form on the CPU: check, allocate, fill, launch.
#include <optional>
#include <tuple>

#include "cpu/kernels.h"
#include "params.h"
#include "torch/check.h"
#include "torch/stable.h"

namespace llm_ext {
namespace {

// The scores come from u or are given; only the backward of prefix pooling needs neither.
void check_one_source(const char* op, const OptionalTensor& u, const OptionalTensor& scores) {
  STD_TORCH_CHECK(u.has_value() != scores.has_value(), op, ": exactly one of u and scores must be given");
}

// Everything the four ops have in common; keeps dense copies alive for the call.
template <typename S>
class PoolArguments {
 public:
  PoolArguments(const char* op, const Tensor& e, const OptionalTensor& u, const OptionalTensor& scores,
                const OptionalTensor& lengths, const OptionalTensor& mask)
      : e_(rows(op, e)),
        u_(u, op, "u", {e.size(2)}),
        scores_(scores, op, "scores", {e.size(0), e.size(1)}),
        lengths_(lengths, op, "lengths", {e.size(0)}, ScalarType::Long),
        mask_(mask, op, "mask", {e.size(0), e.size(1)}, ScalarType::Bool) {
    if (lengths.has_value()) {
      for (int64_t b = 0; b < e.size(0); ++b) {
        const int64_t length = lengths_.get()[b];
        STD_TORCH_CHECK(length >= 0 && length <= e.size(1), op, ": lengths must be from 0 to ", e.size(1), ", got ",
                        length, " in row ", b);
      }
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

  // A new tensor [B, T, D] laid out as e is.
  Tensor empty_like_e() const {
    const int64_t strides[] = {in.e_batch_stride, in.e_step_stride, 1};
    return empty_strided({in.batch, in.steps, in.dim}, strides, kScalarType<S>);
  }

  // A tensor that must be laid out as e is.
  Tensor laid_out_as_e(const char* op, const char* name, const Tensor& t) const {
    check_tensor(t, op, name, kScalarType<S>, {in.batch, in.steps, in.dim});
    if (in.batch * in.steps * in.dim == 0) return t;
    const bool same = (in.batch == 1 || t.stride(0) == in.e_batch_stride) &&
                      (in.steps == 1 || t.stride(1) == in.e_step_stride) && (in.dim == 1 || t.stride(2) == 1);
    if (same) return t;
    Tensor copy = empty_like_e();
    torch::stable::copy_(copy, t);
    return copy;
  }

  PoolInput<S> in;

 private:
  // e as it is where [B, T, D] or [T, B, D] lies dense in memory; otherwise a copy.
  static Tensor rows(const char* op, const Tensor& e) {
    STD_TORCH_CHECK(e.dim() == 3, op, ": e must be [B, T, D], got ", shape_text(e));
    check_tensor(e, op, "e", kScalarType<S>, {e.size(0), e.size(1), e.size(2)});
    const int64_t B = e.size(0), D = e.size(2);
    const bool time_major = e.stride(2) == 1 && e.stride(0) == D && e.stride(1) == B * D;
    return time_major ? e : dense(e);
  }

  Tensor e_;
  Input<S> u_;
  Input<S> scores_;
  Input<int64_t> lengths_;
  Input<bool> mask_;
};

template <typename S>
Tensor workspace_of(int64_t elements) {
  return empty({elements}, kScalarType<Compute<S>>);
}

std::tuple<Tensor, Tensor> attention_pool_forward(const Tensor& e, const OptionalTensor& u,
                                                  const OptionalTensor& scores, const OptionalTensor& lengths,
                                                  const OptionalTensor& mask) {
  constexpr const char* kOp = "attention_pool_forward";
  return with_type<float, double, BFloat16, Float16>(e, kOp, "e", [&](auto type) {
    using S = decltype(type);
    using T = Compute<S>;
    check_one_source(kOp, u, scores);
    const PoolArguments<S> args(kOp, e, u, scores, lengths, mask);
    const Tensor c = empty({args.in.batch, args.in.dim}, kScalarType<S>);
    const Tensor lse = empty({args.in.batch}, kScalarType<T>);
    const PoolKernels<S>& kernel = kernels().pool<S>();
    const int threads = team_size(kernel.threads(args.in, max_threads()));
    const Tensor workspace = workspace_of<S>(kernel.workspace(args.in, threads));
    const PoolForwardParams<S> p = {args.in, mutable_data<S>(c), mutable_data<T>(lse), mutable_data<T>(workspace)};
    run_team(threads, [&](const Team& team) { kernel.forward(p, team); });
    return std::make_tuple(c, lse);
  });
}

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
    const Input<S> c_in(c, kOp, "c", {in.batch, in.dim});
    const Input<T> lse_in(lse, kOp, "lse", {in.batch});
    const Input<S> grad_c_in(grad_c, kOp, "grad_c", {in.batch, in.dim});
    const Input<T> grad_lse_in(grad_lse, kOp, "grad_lse", {in.batch});
    const Tensor de = need_de ? args.empty_like_e() : empty({0}, kScalarType<S>);
    const Output<S> du(need_du && u.has_value(), {in.dim});
    const Output<S> dscores(need_dscores && scores.has_value(), {in.batch, in.steps});
    const PoolKernels<S>& kernel = kernels().pool<S>();
    const int threads = team_size(kernel.threads(in, max_threads()));
    const Tensor workspace = workspace_of<S>(kernel.workspace(in, threads));
    const PoolBackwardParams<S> p = {in,
                                     c_in.get(),
                                     lse_in.get(),
                                     grad_c_in.get(),
                                     grad_lse_in.get(),
                                     need_de ? mutable_data<S>(de) : nullptr,
                                     du.get(),
                                     dscores.get(),
                                     mutable_data<T>(workspace)};
    run_team(threads, [&](const Team& team) { kernel.backward(p, team); });
    return std::make_tuple(de, du.tensor(), dscores.tensor());
  });
}

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
    const Input<T> l0_in(l0, kOp, "l0", {in.batch});
    const Input<T> c0_in(c0, kOp, "c0", {in.batch, in.dim});
    const Tensor c = args.empty_like_e();
    const Tensor share = empty({in.batch, in.steps}, kScalarType<T>);
    const Tensor l_n = empty({in.batch}, kScalarType<T>);
    const Tensor c_n = empty({in.batch, in.dim}, kScalarType<T>);
    const PoolKernels<S>& kernel = kernels().pool<S>();
    const int threads = team_size(kernel.threads(in, max_threads()));
    const Tensor workspace = workspace_of<S>(kernel.prefix_workspace(in, threads));
    const PrefixPoolForwardParams<S> p = {in,
                                          l0_in.get(),
                                          c0_in.get(),
                                          mutable_data<S>(c),
                                          mutable_data<T>(share),
                                          mutable_data<T>(l_n),
                                          mutable_data<T>(c_n),
                                          mutable_data<T>(workspace)};
    run_team(threads, [&](const Team& team) { kernel.prefix_forward(p, team); });
    return std::make_tuple(c, share, l_n, c_n);
  });
}

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
    const Input<T> c0_in(c0, kOp, "c0", {in.batch, in.dim});
    const Tensor c_rows = args.laid_out_as_e(kOp, "c", c);
    const Input<T> share_in(share, kOp, "share", {in.batch, in.steps});
    const Input<T> grad_l_n_in(grad_l_n, kOp, "grad_l_n", {in.batch});
    const Input<T> grad_c_n_in(grad_c_n, kOp, "grad_c_n", {in.batch, in.dim});
    OptionalTensor grad;
    if (grad_c.has_value()) grad = args.laid_out_as_e(kOp, "grad_c", *grad_c);
    const Tensor de = need_de ? args.empty_like_e() : empty({0}, kScalarType<S>);
    const Output<S> du(need_du, {in.dim});
    const Output<S> dscores(need_dscores, {in.batch, in.steps});
    const Output<T> dl0(need_dstate, {in.batch});
    const Output<T> dc0(need_dstate, {in.batch, in.dim});
    const PoolKernels<S>& kernel = kernels().pool<S>();
    const int threads = team_size(kernel.threads(in, max_threads()));
    const Tensor workspace = workspace_of<S>(kernel.prefix_workspace(in, threads));
    const PrefixPoolBackwardParams<S> p = {in,
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
                                           mutable_data<T>(workspace)};
    run_team(threads, [&](const Team& team) { kernel.prefix_backward(p, team); });
    return std::make_tuple(de, du.tensor(), dscores.tensor(), dl0.tensor(), dc0.tensor());
  });
}

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CPU, m) {
  m.impl("attention_pool_forward", TORCH_BOX(&llm_ext::attention_pool_forward));
  m.impl("attention_pool_backward", TORCH_BOX(&llm_ext::attention_pool_backward));
  m.impl("prefix_pool_forward", TORCH_BOX(&llm_ext::prefix_pool_forward));
  m.impl("prefix_pool_backward", TORCH_BOX(&llm_ext::prefix_pool_backward));
}
