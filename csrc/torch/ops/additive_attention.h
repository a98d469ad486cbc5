// The ops additive_attention_*, as every backend has them: arguments, checks, results.
//
// A backend is a struct with
//   static void check_sizes(const char* op, std::initializer_list<int64_t>);
// which throws if a size is too large for its kernels, and two functions, for each type S that tensors are stored as,
//   static void forward(AdditiveAttentionForwardParams<S>&, const Device&);
//   static void backward(AdditiveAttentionBackwardParams<S>&, const Device&);
// which set the workspace of the params and run the kernel.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <tuple>

#include "params/attention.h"
#include "torch/device.h"
#include "torch/dtypes.h"
#include "torch/stable.h"
#include "torch/tensor.h"
#include "torch/tensor_args.h"

namespace llm_ext {

// Checked sizes and inputs of forward and backward. Owns dense copies, which in() makes, for the duration of the call.
template <typename S>
class CheckedAdditiveAttentionArguments {
 public:
  CheckedAdditiveAttentionArguments(const char* op, const Tensor& query, const Tensor& keys, const Tensor& v,
                                    const Tensor& values, const OptionalTensor& key_lengths, const OptionalTensor& mask)
      : CheckedAdditiveAttentionArguments(op, device_of(query), sizes_of(op, query, keys, values), query, keys, v,
                                          values, key_lengths, mask) {}
  // A query that is computed later is not given: in() has null for it.
  CheckedAdditiveAttentionArguments(const char* op, const Device& device, const AdditiveAttentionInput<S>& sizes,
                                    const OptionalTensor& query, const Tensor& keys, const Tensor& v,
                                    const Tensor& values, const OptionalTensor& key_lengths, const OptionalTensor& mask)
      : op_(op),
        device_(device),
        sizes_(sizes),
        query_(input("query", query, {sizes_.batch, sizes_.queries, sizes_.attn_dim})),
        keys_(input("keys", keys, {sizes_.batch, sizes_.keys, sizes_.attn_dim})),
        v_(input("v", v, {sizes_.attn_dim})),
        values_(input("values", values, {sizes_.batch, sizes_.keys, sizes_.value_dim})),
        key_lengths_(key_lengths, op, "key_lengths", {sizes_.batch}, device_),
        per_query_(mask.has_value() && mask->dim() == 3),
        mask_(per_query_ ? mask_input(mask, {sizes_.batch, sizes_.queries, sizes_.keys})
                         : mask_input(mask, {sizes_.batch, sizes_.keys})) {
    if (key_lengths.has_value()) check_lengths(*key_lengths, op, "key_lengths", sizes_.keys);
  }

  const Device& device() const { return device_; }
  // Without pointers and strides.
  const AdditiveAttentionInput<S>& sizes() const { return sizes_; }

  // After all checks of the call.
  AdditiveAttentionInput<S> in() const {
    AdditiveAttentionInput<S> in = sizes_;
    in.query = query_.get();
    in.key = keys_.get();
    in.v = v_.get();
    in.values = values_.get();
    in.key_lengths = key_lengths_.get();
    in.mask = mask_.get();
    in.mask_batch_stride = per_query_ ? in.queries * in.keys : in.keys;
    in.mask_query_stride = per_query_ ? in.keys : 0;
    return in;
  }

  template <typename T = S>
  Input<T> input(const char* name, const OptionalTensor& t, std::initializer_list<int64_t> shape) const {
    return Input<T>(t, op_, name, shape, device_);
  }
  template <typename T = S>
  Output<T> output(bool wanted, std::initializer_list<int64_t> shape) const {
    return Output<T>(wanted, shape, device_);
  }

 private:
  static AdditiveAttentionInput<S> sizes_of(const char* op, const Tensor& query, const Tensor& keys,
                                            const Tensor& values) {
    STD_TORCH_CHECK(query.dim() == 3, op, ": query must be [B, Tq, A], got ", shape_text(query));
    STD_TORCH_CHECK(keys.dim() == 3, op, ": keys must be [B, Tk, A], got ", shape_text(keys));
    STD_TORCH_CHECK(values.dim() == 3, op, ": values must be [B, Tk, Dv], got ", shape_text(values));
    AdditiveAttentionInput<S> in{};
    in.batch = query.size(0);
    in.queries = query.size(1);
    in.keys = keys.size(1);
    in.attn_dim = query.size(2);
    in.value_dim = values.size(2);
    return in;
  }

  Input<bool> mask_input(const OptionalTensor& mask, std::initializer_list<int64_t> shape) const {
    return Input<bool>(mask, op_, "mask", shape, device_);
  }

  // In this order: each is initialized from those above it.
  const char* op_;
  const Device device_;
  const AdditiveAttentionInput<S> sizes_;
  const Input<S> query_;
  const Input<S> keys_;
  const Input<S> v_;
  const Input<S> values_;
  const Input<int64_t> key_lengths_;
  const bool per_query_;
  const Input<bool> mask_;
};

template <typename Backend>
std::tuple<Tensor, Tensor> additive_attention_forward(const Tensor& query, const Tensor& keys, const Tensor& v,
                                                      const Tensor& values, const OptionalTensor& key_lengths,
                                                      const OptionalTensor& mask, bool need_weights) {
  constexpr const char* kOp = "additive_attention_forward";
  return with_type<float, double, BFloat16, Float16>(query, kOp, "query", [&](auto type) {
    using S = decltype(type);
    const CheckedAdditiveAttentionArguments<S> a(kOp, query, keys, v, values, key_lengths, mask);
    const AdditiveAttentionInput<S>& s = a.sizes();
    Backend::check_sizes(kOp, {s.batch, s.queries, s.keys, s.attn_dim, s.value_dim});
    const AdditiveAttentionInput<S> in = a.in();
    const Output<S> context = a.output(true, {in.batch, in.queries, in.value_dim});
    const Output<S> weights = a.output(need_weights, {in.batch, in.queries, in.keys});
    AdditiveAttentionForwardParams<S> p = {in, context.get(), weights.get(), nullptr};
    if (any_elements(context.tensor(), weights.tensor())) Backend::forward(p, a.device());
    return std::make_tuple(context.tensor(), weights.tensor());
  });
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_backward(
    const OptionalTensor& grad_context, const OptionalTensor& grad_weights, const Tensor& query, const Tensor& keys,
    const Tensor& v, const Tensor& values, const OptionalTensor& key_lengths, const OptionalTensor& mask,
    bool need_dquery, bool need_dkeys, bool need_dv, bool need_dvalues) {
  constexpr const char* kOp = "additive_attention_backward";
  return with_type<float, double, BFloat16, Float16>(query, kOp, "query", [&](auto type) {
    using S = decltype(type);
    const CheckedAdditiveAttentionArguments<S> a(kOp, query, keys, v, values, key_lengths, mask);
    const AdditiveAttentionInput<S>& s = a.sizes();
    const int64_t B = s.batch, Tq = s.queries, Tk = s.keys, A = s.attn_dim, Dv = s.value_dim;
    Backend::check_sizes(kOp, {B, Tq, Tk, A, Dv});
    const Input<S> grad_context_in = a.input("grad_context", grad_context, {B, Tq, Dv});
    const Input<S> grad_weights_in = a.input("grad_weights", grad_weights, {B, Tq, Tk});
    const AdditiveAttentionInput<S> in = a.in();
    const Output<S> dquery = a.output(need_dquery, {B, Tq, A});
    const Output<S> dkeys = a.output(need_dkeys, {B, Tk, A});
    const Output<S> dv = a.output(need_dv, {A});
    const Output<S> dvalues = a.output(need_dvalues, {B, Tk, Dv});
    AdditiveAttentionBackwardParams<S> p = {
        in, grad_context_in.get(), grad_weights_in.get(), dquery.get(), dkeys.get(), dv.get(), dvalues.get(), nullptr};
    // Without a pair that of v may have elements; a kernel would look for pairs in B rows that take no memory.
    if (B == 0 || Tq == 0 || Tk == 0) {
      for (Tensor gradient : {dquery.tensor(), dkeys.tensor(), dv.tensor(), dvalues.tensor()}) {
        torch::stable::zero_(gradient);
      }
    } else if (any_elements(dquery.tensor(), dkeys.tensor(), dv.tensor(), dvalues.tensor())) {
      Backend::backward(p, a.device());
    }
    return std::make_tuple(dquery.tensor(), dkeys.tensor(), dv.tensor(), dvalues.tensor());
  });
}

}  // namespace llm_ext
