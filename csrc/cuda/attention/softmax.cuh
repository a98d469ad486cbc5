// The softmax over the keys, one warp per query, forward and backward.
#pragma once

#include "cuda/attention/pairs.cuh"
#include "cuda/device.cuh"

namespace llm_ext {
namespace cuda {
namespace {

template <typename S>
struct SoftmaxParams {
  int64_t batch, queries, keys;
  int64_t first, count;  // the queries of the slab
  Compute<S>* scores;    // [B, count, Tk] in; out: the weights, or backward the gradients of the scores
  S* weights;            // [B, Tq, Tk] out; null: not wanted
  // Backward:
  bool has_gradients;     // whether `gradients` is defined
  Compute<S>* gradients;  // [B, count, Tk] in: of the weights, through the context; out: the weights
  const S* grad_weights;  // [B, Tq, Tk] of the weights themselves; null: zeros
};

// The query of this warp and the offsets of its rows.
struct SoftmaxRow {
  bool exists;
  int64_t in_slab, overall;

  LLM_EXT_DEVICE SoftmaxRow(int64_t batch, int64_t queries, int64_t first, int64_t count) {
    in_slab = static_cast<int64_t>(block_x()) * kWarps + warp_index();
    exists = in_slab < batch * count;
    overall = exists ? in_slab / count * queries + first + in_slab % count : 0;
  }
};

template <typename T>
LLM_EXT_DEVICE T warp_sum(T sum) {
#pragma unroll
  for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

// Replaces the scores of the warp's query by their exponentials relative to the largest. Returns what makes weights of
// them: the inverse of their sum, 0 without a key. Both passes take the maximum and the sum of the scores that they
// have computed: a saved log-sum-exp would have the rounding error of large scores.
template <typename T>
LLM_EXT_DEVICE T exponentials(T* scores, int64_t keys) {
  T max = kMinusInfinity<T>;
  const auto rise_to = [&](T x) { max = x > max || x != x ? x : max; };
  for (int64_t k = lane_index(); k < keys; k += kWarpThreads) rise_to(scores[k]);
#pragma unroll
  for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) rise_to(shuffle_xor(max, mask));
  T sum = T(0);
  for (int64_t k = lane_index(); k < keys; k += kWarpThreads) {
    const T exponential = scores[k] == kMinusInfinity<T> ? T(0) : exp_of(scores[k] - max);
    scores[k] = exponential;
    sum += exponential;
  }
  sum = warp_sum(sum);
  return max == kMinusInfinity<T> ? T(0) : T(1) / sum;
}

template <typename S>
LLM_EXT_SHARING_KERNEL(kThreads, 4)
void additive_softmax(LLM_EXT_PARAMS SoftmaxParams<S> p) {
  using T = Compute<S>;
  const SoftmaxRow row(p.batch, p.queries, p.first, p.count);
  if (!row.exists) return;
  T* scores = p.scores + row.in_slab * p.keys;
  const T scale = exponentials(scores, p.keys);
  for (int64_t k = lane_index(); k < p.keys; k += kWarpThreads) {
    const T weight = scores[k] * scale;
    scores[k] = weight;
    if (p.weights != nullptr) p.weights[row.overall * p.keys + k] = narrow<S>(weight);
  }
}

// ds = weight (g - sum of weight g).
template <typename S>
LLM_EXT_SHARING_KERNEL(kThreads, 4)
void additive_softmax_backward(LLM_EXT_PARAMS SoftmaxParams<S> p) {
  using T = Compute<S>;
  const SoftmaxRow row(p.batch, p.queries, p.first, p.count);
  if (!row.exists) return;
  T* scores = p.scores + row.in_slab * p.keys;
  T* gradients = p.gradients + row.in_slab * p.keys;
  const S* grad_weights = p.grad_weights == nullptr ? nullptr : p.grad_weights + row.overall * p.keys;
  const T scale = exponentials(scores, p.keys);
  // The value of a key without weight may be anything: skip its gradient.
  const auto gradient_of = [&](int64_t k) {
    T g = p.has_gradients ? gradients[k] : T(0);
    if (grad_weights != nullptr) g += widen(grad_weights[k]);
    return g;
  };
  T common = T(0);
  for (int64_t k = lane_index(); k < p.keys; k += kWarpThreads) {
    const T weight = scores[k] * scale;
    if (weight != T(0)) common += weight * gradient_of(k);
  }
  common = warp_sum(common);
  for (int64_t k = lane_index(); k < p.keys; k += kWarpThreads) {
    const T weight = scores[k] * scale;
    scores[k] = weight != T(0) ? weight * (gradient_of(k) - common) : T(0);
    gradients[k] = weight;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace llm_ext
