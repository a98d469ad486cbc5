// Pairs of a query and a key: how tanh is computed, how rows reach shared memory, and how a block shares pairs.
//
// tanh(q + k) = 1 - 2 r with r = 1 / (1 + e^2q e^2k). The exponentials of a tile of queries and of a tile of keys are
// computed when the tiles are loaded to shared memory. A pair then costs a multiply-add and a reciprocal, which two of
// its A numbers share: v / x + w / y = (v y + w x) / (x y). If some |q| or |k| of the tiles is so large that this could
// overflow, and in float64, each pair computes the exponential of q + k, which may cancel.
#pragma once

#include <limits>
#include <type_traits>

#include "cuda/attention/launchers.h"
#include "cuda/device.cuh"
#include "cuda/word_pack.cuh"

namespace llm_ext {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kChunk = 64;           // of the A numbers, in shared memory at once
constexpr int kStride = kChunk + 4;  // between rows in shared memory; avoids bank conflicts
// For |q|, |k| up to this, x y <= (1 + e^42)^2 = 3e36.
constexpr float kLargest = 10.5f;

template <typename T>
constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();
// Numbers per 16-byte pack.
template <typename T>
constexpr int kPackSize = 16 / sizeof(T);

template <int n, typename T>
LLM_EXT_DEVICE void read(const T* from, T (&to)[n]) {
  constexpr int kEach = n < kPackSize<T> ? n : kPackSize<T>;
#pragma unroll
  for (int i = 0; i < n; i += kEach) {
    const Pack<T, kEach> pack = *reinterpret_cast<const Pack<T, kEach>*>(from + i);
#pragma unroll
    for (int j = 0; j < kEach; ++j) to[i + j] = pack.at[j];
  }
}

// Loads the pack of a row of A numbers from `a` on, a multiple of n; numbers beyond the end stay 0.
template <typename S, int n>
LLM_EXT_DEVICE void load_pack(WordPack<S, n>& pack, const S* row, int64_t a, int64_t A) {
  if (A % n == 0 && a < A) {
    pack.load(row + a);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (a + i < A) pack.set(i, row[a + i]);
    }
  }
}

// Whether pairs with this number need the exponential of the sum.
LLM_EXT_DEVICE bool is_large(float x) { return !(x <= kLargest && x >= -kLargest); }
LLM_EXT_DEVICE bool is_large(double) { return true; }

// 1 / (1 + e^2x) for any x. exp_of() is exact enough: r (1 - r) times its relative error is below 1e-7.
template <typename T>
LLM_EXT_DEVICE T exact_r(T x) {
  constexpr T kSaturated = std::is_same_v<T, double> ? 150 : 40;
  return reciprocal(T(1) + exp_of(2 * (x > kSaturated ? kSaturated : x)));
}

// Rows [B, count, A] of queries or keys. Keys that no query attends to may hold any value and count as 0.
template <typename S>
struct Rows {
  const S* data;
  int64_t count;
  const int64_t* lengths;  // [B]; null: all rows are valid
  const bool* seen;        // [B, count]; null: all rows are valid

  LLM_EXT_DEVICE bool has(int64_t b, int64_t row) const {
    return row < count && (lengths == nullptr || row < lengths[b]) && (seen == nullptr || seen[b * count + row]);
  }
};

// kChunk numbers of each row of a tile, on the way to shared memory. Between load() and store() the block decides how
// pairs are computed.
template <typename S, int kRows>
struct Staged {
  using T = Compute<S>;
  static constexpr int kPacksPerRow = kChunk / kPackSize<T>;  // of a row
  static constexpr int kEach = (kRows * kPacksPerRow + kThreads - 1) / kThreads;
  T x[kEach][kPackSize<T>];

  // Loads rows [first, end), numbers from `begin` on. Returns whether one of them is large.
  LLM_EXT_DEVICE bool load(const Rows<S>& rows, int64_t b, int64_t first, int64_t end, int64_t begin, int64_t A) {
    WordPack<S, kPackSize<T>> packs[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int index = i * kThreads + thread_index();
      const int64_t row = first + index / kPacksPerRow, a = begin + index % kPacksPerRow * kPackSize<T>;
      if (index < kRows * kPacksPerRow && row < end && rows.has(b, row)) {
        load_pack(packs[i], rows.data + (b * rows.count + row) * A, a, A);
      }
    }
    bool large = false;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int j = 0; j < kPackSize<T>; ++j) {
        x[i][j] = packs[i][j];
        large |= is_large(x[i][j]);
      }
    }
    return large;
  }
  // Stores the numbers, or e^2x.
  LLM_EXT_DEVICE void store(T* to, bool exact) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int index = i * kThreads + thread_index();
      if (index >= kRows * kPacksPerRow) continue;
      Pack<T, kPackSize<T>> pack;
#pragma unroll
      for (int j = 0; j < kPackSize<T>; ++j) pack.at[j] = exact ? x[i][j] : exact_exp_of(2 * x[i][j]);
      *reinterpret_cast<Pack<T, kPackSize<T>>*>(to + index / kPacksPerRow * kStride +
                                                index % kPacksPerRow * kPackSize<T>) = pack;
    }
  }
};

// Whether `value` is true in any thread of the block; a barrier. `flags` has one element per warp and is in use until
// the next barrier.
LLM_EXT_DEVICE bool any_of_block(bool value, int* flags) {
  int any = value ? 1 : 0;
#pragma unroll
  for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) any |= shuffle_xor(any, mask);
  if (lane_index() == 0) flags[warp_index()] = any;
  block_barrier();
  any = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) any |= flags[w];
  return any != 0;
}

// The partition of a tile of pairs: a thread has kQ strided query rows and kK key rows. Threads with the same pairs
// share the A numbers, slice by slice.
template <int kQ_, int kQueryThreads, int kKeyThreads>
struct PairTile {
  static constexpr int kQ = kQ_, kK = 4;
  static constexpr int kQueryStep = kQueryThreads, kKeyStep = kKeyThreads;
  static constexpr int kQueries = kQ * kQueryThreads, kKeys = kK * kKeyThreads;
  static constexpr int kEach = kQueryThreads * kKeyThreads;  // threads of a slice
  static constexpr int kSlices = kThreads / kEach;
};
using ManyPairs = PairTile<4, 8, 8>;
using FewPairs = PairTile<4, 2, 8>;

constexpr int larger(int a, int b) { return a > b ? a : b; }

}  // namespace
}  // namespace cuda
}  // namespace llm_ext
