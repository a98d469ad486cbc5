// Permutations of lanes: interleaving, transposition, and sums of several vectors at once.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// low: the lower lanes of a and b, alternating; high: the upper lanes.
template <typename T>
static inline void interleave(Vec<T> a, Vec<T> b, Vec<T>& low, Vec<T>& high) {
  if constexpr (kLanes<T> == 2) {
    low = Vec<T>{a[0], b[0]};
    high = Vec<T>{a[1], b[1]};
  } else if constexpr (kLanes<T> == 4) {
    low = Vec<T>{a[0], b[0], a[1], b[1]};
    high = Vec<T>{a[2], b[2], a[3], b[3]};
  } else if constexpr (kLanes<T> == 8) {
    low = Vec<T>{a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]};
    high = Vec<T>{a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]};
  } else {
    low = Vec<T>{a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3], a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]};
    high = Vec<T>{a[8],  b[8],  a[9],  b[9],  a[10], b[10], a[11], b[11],
                  a[12], b[12], a[13], b[13], a[14], b[14], a[15], b[15]};
  }
}

// The even lanes followed by the odd lanes: the inverse of interleaving.
template <typename T>
static inline Vec<T> separate(Vec<T> v) {
  if constexpr (kLanes<T> == 2) {
    return v;
  } else if constexpr (kLanes<T> == 4) {
    return Vec<T>{v[0], v[2], v[1], v[3]};
  } else if constexpr (kLanes<T> == 8) {
    return Vec<T>{v[0], v[2], v[4], v[6], v[1], v[3], v[5], v[7]};
  } else {
    return Vec<T>{v[0], v[2], v[4], v[6], v[8], v[10], v[12], v[14], v[1], v[3], v[5], v[7], v[9], v[11], v[13], v[15]};
  }
}

// Transposes a square of kLanes vectors: log2(kLanes) rounds that interleave rows half the square apart.
template <typename T>
static inline void transpose(Vec<T> (&square)[kLanes<T>]) {
  constexpr int kHalf = kLanes<T> / 2;
#pragma GCC unroll 4
  for (int n = kLanes<T>; n > 1; n /= 2) {
    Vec<T> next[kLanes<T>];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) interleave<T>(square[i], square[i + kHalf], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) square[i] = next[i];
  }
}

// Reduces kCount vectors, a power of two up to kLanes, to one whose lane l holds a partial sum of v[l % kCount]. With
// kCount = kLanes the sums are complete. Adds halves, in the order of sum_lanes.
template <typename T, int kCount>
static inline Vec<T> sum_halves(Vec<T>* v) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) {
      Vec<T> low, high;
      interleave<T>(v[i], v[i + kCount / 2], low, high);
      v[i] = low + high;
    }
    return sum_halves<T, kCount / 2>(v);
  }
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
