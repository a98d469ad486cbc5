// Log-sum-exps in two numbers (LogSum in params/types.h).
#pragma once

#include <limits>

#include "cuda/device.cuh"
#include "params/types.h"

namespace llm_ext {
namespace cuda {

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <typename T>
LLM_EXT_DEVICE LogSum<T> no_scores() {
  return {-kInfinity<T>, T(0)};
}

// exp(x) for x <= 0, which may be -inf.
template <typename T>
LLM_EXT_DEVICE T share_of(T x) {
  return x == -kInfinity<T> ? T(0) : exp_of(x);
}

// Adds the scores of `added` to those of l. Of all of them, `added` has the share `share` and l had `keep`.
template <typename T>
LLM_EXT_DEVICE void add_scores(LogSum<T>& l, const LogSum<T>& added, T& keep, T& share) {
  keep = T(1);
  share = T(0);
  if (added.max == -kInfinity<T>) return;
  const T high = l.max > added.max ? l.max : added.max;
  const T old_sum = l.sum * share_of(l.max - high), new_sum = added.sum * share_of(added.max - high);
  l = {high, old_sum + new_sum};
  const T inverse = reciprocal(l.sum);
  keep = old_sum * inverse;
  share = new_sum * inverse;
}

// The log-sum-exp that a caller has given. That of scores has a sum of at least 1; one that could underflow is replaced
// by a sum of 1.
template <typename T>
LLM_EXT_DEVICE LogSum<T> given_log_sum(const LogSum<T>& l) {
  if (l.sum >= T(1e-9)) return l;
  return l.sum == T(0) ? no_scores<T>() : LogSum<T>{l.max + log_of(l.sum), T(1)};
}

// As one number.
template <typename T>
LLM_EXT_DEVICE T log_sum_exp(const LogSum<T>& l) {
  return l.max == kInfinity<T> || l.max == -kInfinity<T> ? l.max : l.max + log_of(l.sum);
}

}  // namespace cuda
}  // namespace llm_ext
