// Packing of matrices for the micro-kernel.
//
// B, `cols` columns of depth k, is packed in panels of NR columns: panel[k][NR], so that the micro-kernel reads it from
// front to back. Panel p starts at p * NR * k. A is used in place or packed in tiles of MR columns.
//
// 16-bit weights keep their type and are widened when the micro-kernel loads them. With products of bfloat16 pairs, two
// numbers of k are adjacent for each column: panel[k / 2][NR][2]. An odd k is padded with a zero.
#pragma once

#include "cpu/gemm/blocking.inl"
#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"
#include "cpu/simd/float16.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/shuffle.inl"
#include "cpu/simd/traits.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// The rows of a matrix, `stride` apart, from row `first` of its `count` rows on; the first row follows the last. One
// type for all weights: the packing of each type is compiled once.
template <typename S>
struct WeightRows {
  const S* data;
  int64_t stride;
  int64_t count;
  int64_t first = 0;

  const S* operator()(int64_t i) const {
    const int64_t row = first + i;
    return data + (row < count ? row : row - count) * stride;
  }
};

// Packs `panels` of w^T, where w is [cols, k]: panel[i][j] = w(p * kNR + j)[i], or pairs of them.
template <typename R, typename Row>
__attribute__((noinline)) static void pack_transposed(Row w, int64_t cols, int64_t k, Range panels, R* packed) {
  using T = Compute<R>;
  using Unit = Choose<kPair<R> == 2, T, R>;  // a pair has the size of T and is moved as one
  const int64_t units = divide_up(k, kPair<R>);
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const int vectors = panel_vectors<T>(cols, p);
    Unit* panel = reinterpret_cast<Unit*>(packed + p * kNR<T> * padded<R>(k));
    // In short runs of k: the cache lines read stay in L1 while all columns pass.
    constexpr int64_t kRun = 4 * kLanes<T>;
    for (int64_t begin = 0; begin < units; begin += kRun) {
      const int64_t end = begin + kRun < units ? begin + kRun : units;
      for (int v = 0; v < vectors; ++v) {
        const int64_t first = p * kNR<T> + v * kLanes<T>;
        for (int64_t i = begin; i < end; i += kLanes<T>) {
          const int count = end - i < kLanes<T> ? static_cast<int>(end - i) : kLanes<T>;
          const auto column = [&](int64_t col) {
            if constexpr (kPair<R> == 2) {
              const int64_t left = k - 2 * i;
              return load_pairs(w(col) + 2 * i, left < 2 * count ? static_cast<int>(left) : 2 * count);
            } else {
              return load_partial(w(col) + i, count);
            }
          };
          Vec<T> square[kLanes<T>];
#pragma GCC unroll 16
          for (int j = 0; j < kLanes<T>; ++j) square[j] = first + j < cols ? column(first + j) : Vec<T>{};
          transpose<T>(square);
          Unit* target = panel + (i * vectors + v) * kLanes<T>;
          for (int j = 0; j < count; ++j) store_exact(target + j * vectors * kLanes<T>, square[j]);
        }
      }
    }
  }
}

// Packs `panels` of k rows with `cols` columns: panel[i][j] = row(i)[p * kNR + j], or pairs of them. row(i) may be
// null: zeros. Calls row(i) in ascending order.
template <typename R, typename Row>
__attribute__((noinline)) static void pack_rows(Row row, int64_t cols, int64_t k, Range panels, R* packed) {
  using T = Compute<R>;
  using Unit = Choose<kPair<R> == 2, T, R>;
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const int vectors = panel_vectors<T>(cols, p);
    const int64_t first = p * kNR<T>;
    const int64_t width = cols - first < vectors * kLanes<T> ? cols - first : vectors * kLanes<T>;
    Unit* target = reinterpret_cast<Unit*>(packed + first * padded<R>(k));
    for (int64_t i = 0; i < k; i += kPair<R>, target += vectors * kLanes<T>) {
      const auto* source = row(i);
      const auto* partner = kPair<R> == 2 && i + 1 < k ? row(i + 1) : nullptr;
      for (int v = 0; v < vectors; ++v) {
        const int64_t left = width - v * kLanes<T>;
        const int lanes = left < kLanes<T> ? static_cast<int>(left) : kLanes<T>;
        const int64_t offset = first + v * kLanes<T>;
        Vec<T> value = source == nullptr ? Vec<T>{} : load_partial(source + offset, lanes);
        if constexpr (kPair<R> == 2) {
          value = make_pairs(value, partner == nullptr ? Vec<T>{} : load_partial(partner + offset, lanes));
        }
        store_exact(target + v * kLanes<T>, value);
      }
    }
  }
}

// Packs `columns` of `depth` rows as A^T, for a product that sums over these rows: in tiles of up to MR columns,
// tile[i][m] = row(i)[first column of the tile + m], or pairs of them.
template <typename L>
static inline void pack_columns(const L* rows, int64_t stride, int64_t depth, Range columns, L* packed) {
  const Tiles tiles(columns.size());
  // Row by row: column by column, the cache lines of a tile would compete for a few sets of L1.
  for (int64_t i = 0; i < depth; i += kPair<L>) {
    const L* row = rows + i * stride + columns.begin;
    for (int64_t j = 0; j < columns.size(); j += 64 / sizeof(L)) __builtin_prefetch(row + kPrefetchRows * stride + j);
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const Range range = tiles[tile];
      L* target = packed + range.begin * padded<L>(depth) + i * range.size();
      if constexpr (kPair<L> == 2) {
        const bool whole = i + 1 < depth;
        for (int64_t m = 0; m < range.size(); ++m) {
          target[2 * m] = row[range.begin + m];
          target[2 * m + 1] = whole ? row[stride + range.begin + m] : L{};
        }
      } else if (range.size() == kMR) {
        __builtin_memcpy(target, row + range.begin, kMR * sizeof(L));  // a constant size: two moves
      } else {
        for (int64_t m = 0; m < range.size(); ++m) target[m] = row[range.begin + m];
      }
    }
  }
}

// A of a product: rows in memory, or the result of pack_columns.
template <typename L>
struct Rows {
  using Number = L;
  static constexpr bool kPacked = false;
  const L* data;
  int64_t stride;

  const L* tile(int64_t first, int64_t) const { return data + first * stride; }
};
template <typename L>
struct PackedColumns {
  using Number = L;
  static constexpr bool kPacked = true;
  static constexpr int64_t stride = 0;  // each packed tile has its own
  const L* data;

  const L* tile(int64_t first, int64_t k) const { return data + first * padded<L>(k); }
};

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
