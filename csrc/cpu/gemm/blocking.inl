// Block sizes of the matrix products C = A B, named as in BLIS.
//
// B is a packed weight matrix: panels of NR columns, panel[k][NR]. The micro-kernel multiplies MR rows of A with one
// panel. A is blocked by MC rows; only the weight gradients block k (KC) and the columns (NC), since elsewhere k is a
// layer's width.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"
#include "cpu/simd/float16.inl"
#include "cpu/simd/traits.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// MR x NR: the register block of the micro-kernel, NR in vectors. MR x NR accumulators, one vector of B and one
// broadcast of A fill the register file: 32 registers with AVX-512, 16 without.
constexpr int kMR = 6;
constexpr int kNRVectors = LLM_EXT_VECTOR_BYTES == 64 ? 4 : 2;
template <typename T>
constexpr int64_t kNR = kNRVectors * kLanes<T>;

// The tallest tile. With AVX-512, 7 rows are one tile of two passes over half the columns: tiles of 4 + 3 rows would
// read the panel twice for too few multiply-adds. Zen 5, LSTM H512: 39 us a step, not 46; docs/lab/cpu-constants.md.
constexpr int kMaxMR = LLM_EXT_VECTOR_BYTES == 64 ? 7 : kMR;
constexpr int kMaxMRVectors = 2;

// Numbers of k that are adjacent in a panel of R: pairs if the ISA multiplies pairs of bfloat16.
template <typename R>
constexpr int kPair = kSame<R, BFloat16> && kHasDotPairs ? 2 : 1;

// The type of A in products with weights of S.
template <typename S>
using Factor = Choose<kPair<S> == 2, S, Compute<S>>;

// MC, in bytes of A: an MC x k block of rows stays in the L2 cache (512 KB or more) beside the current panel of B while
// all panels pass. 128 KB, Zen 3: docs/lab/cpu-constants.md.
constexpr int64_t kMCBytes = 128 << 10;

// KC, MC and NC (in panels of NR columns) of the weight gradients, a product over all rows of a sequence. KC: the depth
// of a block, 384 floats. MC: its packed block of dz stays in the L2 cache. NC: wide enough that little of dz is packed
// twice. docs/lab/cpu-constants.md
template <typename T>
constexpr int64_t kGradientKC = 1536 / sizeof(T);
constexpr int64_t kGradientMC = 16 * kMR;
constexpr int64_t kGradientNCPanels = 2048 / (kNRVectors * LLM_EXT_VECTOR_BYTES);

// Elements of both packed blocks of a weight gradient: KC x MC and KC x NC.
template <typename T>
constexpr int64_t kGradientWorkspace = kGradientKC<T> * (kGradientMC + kGradientNCPanels * kNR<T>);

// Software prefetch distances, in bytes of a panel and in rows to pack. They help where the hardware prefetcher stops,
// at the start of a page or row; 3 % of a backward pass on Zen 3. Panels are not prefetched with AVX-512, where it made
// steps on Zen 5 slower: docs/lab/cpu-constants.md.
constexpr bool kPrefetchesPanels = LLM_EXT_VECTOR_BYTES < 64;
constexpr int kPrefetchBytes = 512;
constexpr int64_t kPrefetchRows = 8;
// Packed weights of more bytes may not stay in any cache from step to step. Then the next panel is prefetched while
// the last rows use the current one. 6 MB, Zen 3: docs/lab/cpu-constants.md.
constexpr int64_t kUncachedBytes = 6 << 20;

// Up to this many rows, a product with W [k, cols] uses the unpacked W. Zen 5: docs/lab/cpu-constants.md.
constexpr int64_t kUnpackedGradientRows = 32;

// Multiply-adds of a product that are worth one more thread, which costs about 3 us. T16 H64 takes 8 us on one thread
// or two.
constexpr double kWorkPerThread = 1.0e5;

// Splits n rows into tiles of at most `most` rows, as even as possible; `most_alone` rows still are a single tile.
// Divides once.
struct Tiles {
  explicit Tiles(int64_t n, int most = kMR, int most_alone = kMaxMR)
      : count(n == most_alone ? 1 : divide_up(n, most)), size(n / (count > 0 ? count : 1)), larger(n - size * count) {}

  Range operator[](int64_t i) const {
    const int64_t begin = i * size + (i < larger ? i : larger);
    return {begin, begin + size + (i < larger ? 1 : 0)};
  }

  int64_t count;
  int64_t size;
  int64_t larger;  // the number of tiles, at the front, that have one row more
};

template <typename T>
static inline int64_t panels_of(int64_t cols) {
  return divide_up(cols, kNR<T>);
}

// Vectors per row of panel p. The last panel has only as many as it needs.
template <typename T>
static inline int panel_vectors(int64_t cols, int64_t p) {
  const int64_t left = cols - p * kNR<T>;
  return left >= kNR<T> ? kNRVectors : static_cast<int>(divide_up(left, kLanes<T>));
}

// k rounded up to whole pairs.
template <typename R>
static inline int64_t padded(int64_t k) {
  return divide_up(k, kPair<R>) * kPair<R>;
}

template <typename R>
static inline int64_t packed_size(int64_t cols, int64_t k) {
  constexpr int64_t kWide = kLanes<Compute<R>>;
  return divide_up(cols, kWide) * kWide * padded<R>(k);
}

// MC: rows of A per block, for rows of k numbers. A multiple of MR.
template <typename L>
static inline int64_t mc_rows(int64_t k) {
  const int64_t fitting = kMCBytes / static_cast<int64_t>(sizeof(L)) / (k + 1) / kMR * kMR;
  return fitting > kMR ? fitting : kMR;
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
