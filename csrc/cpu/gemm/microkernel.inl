// The micro-kernel: M <= kMaxMR rows of A times one panel of B.
//
// It stores its sums to memory, and the caller finishes them (bias, activation, derivative). So there is one
// micro-kernel per shape, not one per shape and way to finish, at the cost of a few stores and loads per hundreds of
// multiply-adds.
#pragma once

#include "cpu/gemm/blocking.inl"
#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"
#include "cpu/simd/float16.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// sums[m][column] = sum over i of a(m, i) * panel[i][column], for kCount of the NV vectors of columns, from kFirst on.
//
// a(m, i) is a[m * stride + i]; packed, a[i * M + m]; in packed pairs, a[i / 2 * M + m][i % 2]. `panel` is
// [k][NV vectors], or pairs. `sums` is [M][NV vectors] and overlaps neither factor. The k elements (pairs: k / 2) from
// `ahead` on, `ahead_step` apart, are prefetched, never read.
//
// With few accumulators the sum is split over several sets of them, to cover the latency of a multiply-add: four
// cycles, while two can start in each cycle.
template <typename L, typename R, int M, int NV, int kFirst, int kCount, bool kPacked>
static inline void multiply_vectors(const L* a, int64_t stride, int64_t k, const R* panel, Compute<R>* sums,
                                    const R* ahead, int64_t ahead_step) {
  using T = Compute<R>;
  constexpr int kSets = M * kCount >= 8 ? 1 : (M * kCount >= 4 ? 2 : 4);
  constexpr int kWidth = NV * kLanes<T>;
  Vec<T> acc[kSets][M][kCount] = {};
  const auto accumulate = [&](Vec<T>(&set)[M][kCount], int64_t i) {
    const R* const right = panel + (i * kWidth + kFirst * kLanes<T>)*kPair<R>;
    if (kPrefetchesPanels) __builtin_prefetch(ahead + i * ahead_step);
    if constexpr (kPair<R> == 1) {
      Vec<T> b[kCount];
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) b[v] = load(right + v * kLanes<T>);
#pragma GCC unroll 7
      for (int m = 0; m < M; ++m) {
        const Vec<T> left = broadcast(kPacked ? a[i * M + m] : a[m * stride + i]);
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) set[m][v] += left * b[v];
      }
    } else {
#pragma GCC unroll 7
      for (int m = 0; m < M; ++m) {
        const L* const left = kPacked ? a + 2 * (i * M + m) : a + m * stride + 2 * i;
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) set[m][v] = dot_pairs(set[m][v], left, 2, right + 2 * v * kLanes<T>);
      }
    }
  };
  const int64_t units = kPacked ? divide_up(k, kPair<R>) : k / kPair<R>;
  int64_t i = 0;
  for (; i + kSets <= units; i += kSets) {
#pragma GCC unroll 4
    for (int s = 0; s < kSets; ++s) accumulate(acc[s], i + s);
  }
  for (; i < units; ++i) accumulate(acc[0], i);
  if (kPair<R> == 2 && !kPacked && k % 2 != 0) {  // the last number of an odd k: do not read a pair
    const R* const right = panel + (i * kWidth + kFirst * kLanes<T>)*kPair<R>;
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < kCount; ++v) {
        if constexpr (kPair<R> == 2) {
          acc[0][m][v] = dot_pairs(acc[0][m][v], a + m * stride + k - 1, 1, right + 2 * v * kLanes<T>);
        }
      }
    }
  }
#pragma GCC unroll 7
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) {
#pragma GCC unroll 4
      for (int s = 1; s < kSets; ++s) acc[0][m][v] += acc[s][m][v];
      store(sums + m * kWidth + (kFirst + v) * kLanes<T>, acc[0][m][v]);
    }
  }
}

// For all NV vectors: in one pass, or in passes that leave registers for M > MR rows.
template <typename L, typename R, int M, int NV, bool kPacked>
__attribute__((noinline)) static void multiply(const L* a, int64_t stride, int64_t k, const R* panel, Compute<R>* sums,
                                               const R* ahead, int64_t ahead_step) {
  constexpr int kCount = M <= kMR || NV <= kMaxMRVectors ? NV : kMaxMRVectors;
  multiply_vectors<L, R, M, NV, 0, kCount, kPacked>(a, stride, k, panel, sums, ahead, ahead_step);
  if constexpr (kCount < NV) {
    multiply_vectors<L, R, M, NV, kCount, NV - kCount, kPacked>(a, stride, k, panel, sums, ahead, ahead_step);
  }
}

template <typename L, typename R>
using Multiply = void (*)(const L*, int64_t, int64_t, const R*, Compute<R>*, const R*, int64_t);

// The micro-kernel of m rows and nv vectors.
template <typename L, typename R, bool kPacked>
static inline Multiply<L, R> multiply_for(int m, int nv) {
#define LLM_EXT_ROWS(NV)                                                                          \
  multiply<L, R, 1, NV, kPacked>, multiply<L, R, 2, NV, kPacked>, multiply<L, R, 3, NV, kPacked>, \
      multiply<L, R, 4, NV, kPacked>, multiply<L, R, 5, NV, kPacked>, multiply<L, R, 6, NV, kPacked>
  static constexpr Multiply<L, R> kTable[kNRVectors][kMaxMR] = {
#if LLM_EXT_VECTOR_BYTES == 64
      {LLM_EXT_ROWS(1), multiply<L, R, 7, 1, kPacked>},
      {LLM_EXT_ROWS(2), multiply<L, R, 7, 2, kPacked>},
      {LLM_EXT_ROWS(3), multiply<L, R, 7, 3, kPacked>},
      {LLM_EXT_ROWS(4), multiply<L, R, 7, 4, kPacked>},
#else
      {LLM_EXT_ROWS(1)},
      {LLM_EXT_ROWS(2)},
#endif
  };
#undef LLM_EXT_ROWS
  return kTable[nv - 1][m - 1];
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
