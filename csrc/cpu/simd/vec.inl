// Vectors of LLM_EXT_VECTOR_BYTES bytes: GCC vector types with plain operators. Intrinsics appear only where there is
// no operator or it is slow.
#pragma once

#include "cpu/isa/isa.h"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

template <typename T>
struct VecType;
template <>
struct VecType<float> {
  typedef float type __attribute__((vector_size(LLM_EXT_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(LLM_EXT_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(LLM_EXT_VECTOR_BYTES)));
};
template <>
struct VecType<double> {
  typedef double type __attribute__((vector_size(LLM_EXT_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(LLM_EXT_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t integer __attribute__((vector_size(LLM_EXT_VECTOR_BYTES)));
};

template <typename T>
using Vec = typename VecType<T>::type;
template <typename T>
using IntVec = typename VecType<T>::integer;

template <typename T>
constexpr int kLanes = LLM_EXT_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <typename T>
static inline T infinity() {
  return T(__builtin_inf());
}

template <typename T>
static inline Vec<T> broadcast(T s) {
  return s - Vec<T>{};  // s - 0 is s, including NaN and the sign of zero
}

template <typename T>
static inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecType<T>::unaligned*>(p);
}

template <typename T>
static inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecType<T>::unaligned*>(p) = v;
}

// The sum of all lanes: the upper half is added to the lower until one lane is left.
template <typename T>
static inline T sum_lanes(Vec<T> v) {
#if LLM_EXT_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    return _mm512_reduce_add_ps((__m512)v);
  } else {
    return _mm512_reduce_add_pd((__m512d)v);
  }
#elif LLM_EXT_VECTOR_BYTES == 32
  // Shuffles: the generic code below goes through memory.
  if constexpr (sizeof(T) == 4) {
    const __m128 half = _mm256_castps256_ps128((__m256)v) + _mm256_extractf128_ps((__m256)v, 1);
    const __m128 quarter = half + _mm_movehl_ps(half, half);
    return quarter[0] + quarter[1];
  } else {
    const __m128d half = _mm256_castpd256_pd128((__m256d)v) + _mm256_extractf128_pd((__m256d)v, 1);
    return half[0] + half[1];
  }
#else
  T partial[kLanes<T>];
  store(partial, v);
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) partial[i] += partial[i + half];
  }
  return partial[0];
#endif
}

// Calls body(offset, lanes) for [0, n) in steps of a vector; the last may have fewer lanes.
template <typename T, typename Body>
static inline void for_each_vector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) body(i, kLanes<T>);
  if (i < n) body(i, static_cast<int>(n - i));
}

// Prefetches row + d if a cache line's worth of elements starts at d. For loops over d.
template <typename S>
static inline void prefetch(const S* row, int64_t d) {
  if (d % (64 / static_cast<int64_t>(sizeof(S))) == 0) __builtin_prefetch(row + d);
}

template <typename T>
static inline void zero(T* p, int64_t n) {
  __builtin_memset(p, 0, n * sizeof(T));
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
