// Products of few rows with unpacked weights: packing would cost more than it saves.
//
// row_dots: x W^T for W [cols, k], as dot products along k. A tile of accumulators, the vectors of its columns and one
// vector of a row fill the register file; each dot product ends with a sum over lanes.
// product_unpacked: x W for W [k, cols], vectors along the columns.
#pragma once

#include "cpu/gemm/blocking.inl"
#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/shuffle.inl"
#include "cpu/simd/traits.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Rows and columns of a tile of dot products. Other shapes: docs/lab/single-steps.md.
constexpr int kDotRows = LLM_EXT_VECTOR_BYTES == 64 ? 6 : 2;
template <typename T, int kRowsOfTile>
constexpr int kDotColumns = [] {
  constexpr int kChains = 8;  // multiply-adds in flight
  constexpr int kWanted = kRowsOfTile == 1 ? kChains : 4;
  return kLanes<T> < kWanted ? kLanes<T> : kWanted;
}();

// Rows of x and of W, over k numbers.
template <typename L, typename R>
struct DotFactors {
  const L* a;
  int64_t a_stride;
  const R* w;
  int64_t w_stride;
  int64_t k;

  DotFactors rows_from(int64_t row) const { return {a + row * a_stride, a_stride, w, w_stride, k}; }
  DotFactors columns_from(int64_t col) const { return {a, a_stride, w + col * w_stride, w_stride, k}; }
};

// acc[m * N + n] += a_m . w_n, not yet summed over lanes.
template <typename T, int M, int N, typename L, typename R>
static inline void add_dots(const DotFactors<L, R>& f, Vec<T> (&acc)[M * N]) {
  const auto add = [&](auto load_at) {
    Vec<T> right[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) right[n] = load_at(f.w + n * f.w_stride);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const Vec<T> left = load_at(f.a + m * f.a_stride);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[m * N + n] += left * right[n];
    }
  };
  int64_t i = 0;
  for (; i + kLanes<T> <= f.k; i += kLanes<T>) add([&](const auto* row) { return load(row + i); });
  if (i < f.k) add([&](const auto* row) { return load_partial(row + i, static_cast<int>(f.k - i)); });
}

// dots[m][j] = a_m . w_j of `first` plus the same of `second`, for M rows and the first `lanes` columns of a vector.
template <typename T, int M, typename L1, typename L2, typename R>
static inline void row_dots(const DotFactors<L1, R>& first, const DotFactors<L2, R>& second, int lanes, Vec<T>* dots) {
  constexpr int N = kDotColumns<T, M>;
  constexpr int kTiles = kLanes<T> / N;
  if (lanes < kLanes<T>) {
    for (int j = 0; j < lanes; ++j) {
      Vec<T> acc[M] = {};
      add_dots<T, M, 1>(first.columns_from(j), acc);
      add_dots<T, M, 1>(second.columns_from(j), acc);
      for (int m = 0; m < M; ++m) dots[m][j] = sum_lanes<T>(acc[m]);
    }
    return;
  }
  Vec<T> tiles[M][kTiles];
  for (int t = 0; t < kTiles; ++t) {
    Vec<T> acc[M * N];
#pragma GCC unroll 24
    for (int i = 0; i < M * N; ++i) acc[i] = Vec<T>{};  // one by one: GCC would clear the array in memory
    add_dots<T, M, N>(first.columns_from(t * N), acc);
    add_dots<T, M, N>(second.columns_from(t * N), acc);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) tiles[m][t] = sum_halves<T, N>(acc + m * N);
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    dots[m] = sum_halves<T, kTiles>(tiles[m]);
    for (int n = kTiles; n > 1; n /= 2) dots[m] = separate<T>(dots[m]);  // undoes the interleaving of the tiles
  }
}

// row_dots for 1 to kDotRows rows.
template <typename T, typename L1, typename L2, typename R>
static inline void row_dots(const DotFactors<L1, R>& first, const DotFactors<L2, R>& second, int64_t rows, int lanes,
                            Vec<T>* dots) {
  using Dots = void (*)(const DotFactors<L1, R>&, const DotFactors<L2, R>&, int, Vec<T>*);
  static constexpr Dots kTable[kDotRows] = {
      row_dots<T, 1, L1, L2, R>, row_dots<T, 2, L1, L2, R>,
#if LLM_EXT_VECTOR_BYTES == 64
      row_dots<T, 3, L1, L2, R>, row_dots<T, 4, L1, L2, R>, row_dots<T, 5, L1, L2, R>, row_dots<T, 6, L1, L2, R>,
#endif
  };
  // Inlined for a single row. GRU H64: 6.5 us a step, not 6.8; docs/lab/cpu-constants.md.
  if (rows == 1) return row_dots<T, 1>(first, second, lanes, dots);
  kTable[rows - 1](first, second, lanes, dots);
}

// y = a w for M rows of a and NV vectors of columns, the last of which has `lanes` lanes. w is [k, *], unpacked.
template <typename S, int M, int NV>
static inline void multiply_unpacked(const S* a, int64_t a_stride, int64_t k, const S* w, int64_t w_stride, S* y,
                                     int64_t y_stride, int lanes) {
  Vec<S> acc[M * NV];
#pragma GCC unroll 24
  for (int i = 0; i < M * NV; ++i) acc[i] = Vec<S>{};
  for (int64_t i = 0; i < k; ++i) {
    Vec<S> right[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      const S* from = w + i * w_stride + v * kLanes<S>;
      right[v] = v + 1 < NV || lanes == kLanes<S> ? load(from) : load_partial(from, lanes);
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const Vec<S> left = broadcast(a[m * a_stride + i]);
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) acc[m * NV + v] += left * right[v];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < NV; ++v) {
      store_partial(y + m * y_stride + v * kLanes<S>, acc[m * NV + v], v + 1 < NV ? kLanes<S> : lanes);
    }
  }
}

// Columns of y = a w for rows of a and w [k, *], unpacked: each panel of columns is read for all tiles of rows while it
// is in the cache.
template <typename S>
static inline void product_unpacked(const S* a, int64_t a_stride, int64_t rows, int64_t k, const S* w, int64_t w_stride,
                                    S* y, int64_t y_stride, Range columns) {
  const Tiles tiles(rows, kMR, kMR);
  const auto block = [&](auto vectors, int64_t col, int lanes) {
    constexpr int NV = decltype(vectors)::value;
    using Block = void (*)(const S*, int64_t, int64_t, const S*, int64_t, S*, int64_t, int);
    static constexpr Block kTable[kMR] = {multiply_unpacked<S, 1, NV>, multiply_unpacked<S, 2, NV>,
                                          multiply_unpacked<S, 3, NV>, multiply_unpacked<S, 4, NV>,
                                          multiply_unpacked<S, 5, NV>, multiply_unpacked<S, 6, NV>};
    for (int64_t i = 0; i < tiles.count; ++i) {
      const Range r = tiles[i];
      kTable[r.size() - 1](a + r.begin * a_stride, a_stride, k, w + col, w_stride, y + r.begin * y_stride + col,
                           y_stride, lanes);
    }
  };
  int64_t col = columns.begin;
  for (; col + kNR<S> <= columns.end; col += kNR<S>) block(Constant<kNRVectors>{}, col, kLanes<S>);
  for (; col < columns.end; col += kLanes<S>) {
    const int64_t left = columns.end - col;
    block(Constant<1>{}, col, left < kLanes<S> ? static_cast<int>(left) : kLanes<S>);
  }
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
