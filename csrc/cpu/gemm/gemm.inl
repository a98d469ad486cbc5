// Matrix products with packed B: loops over panels, tiles of MR rows and blocks of MC rows around the micro-kernel.
// Sums go to a callback, a vector at a time, so that bias, activation and the step of a cell need no pass of their own.
#pragma once

#include "cpu/gemm/blocking.inl"
#include "cpu/gemm/microkernel.inl"
#include "cpu/gemm/packing.inl"
#include "cpu/isa/isa.h"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/traits.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Panels of a product, and whether to read them backwards. Repeated products should alternate: the panels that a cache
// still holds then come first. Only done for a single tile, which is bound by reading. Zen 5, LSTM B1 H512: 19.2 us a
// step, not 20.6; docs/lab/cpu-constants.md.
struct Panels {
  Range range;
  bool backwards = false;
};

// a [rows, k] times panels of kGates packed matrices with `cols` columns each, `gate_size` elements apart. Calls
// finish(row, column, values, lanes) with one vector of each gate, and before that fetch(row, column), which may
// prefetch the memory that finish needs from that column on. A panel stays in the cache for all tiles of rows.
template <int kGates, typename R, typename Left, typename Fetch, typename Finish>
static inline void gates_product(Left a, int64_t rows, int64_t k, const R* packed, int64_t gate_size, int64_t cols,
                                 Panels panels, Fetch fetch, Finish finish) {
  using T = Compute<R>;
  using L = typename Left::Number;
  constexpr int kSums = kMaxMR * kNR<T>;
  alignas(64) T sums[kGates * kSums];
  const Tiles tiles(rows);
  const int64_t depth = padded<R>(k);
  const bool uncached =
      kPrefetchesPanels && kGates * cols * depth * static_cast<int64_t>(sizeof(R)) > kUncachedBytes && !Left::kPacked;
  const bool backwards = panels.backwards && tiles.count == 1;
  for (int64_t i = panels.range.begin; i < panels.range.end; ++i) {
    const int64_t p = backwards ? panels.range.end - 1 - (i - panels.range.begin) : i;
    const int64_t first = p * kNR<T>;
    const int64_t next = (p + 1 < panels.range.end ? p + 1 : panels.range.begin) * kNR<T>;
    const int vectors = panel_vectors<T>(cols, p);
    const int64_t width = cols - first < kNR<T> ? cols - first : kNR<T>;
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const Range tile_rows = tiles[tile];
      const int count = static_cast<int>(tile_rows.size());
      for (int64_t m = tile_rows.begin; m < tile_rows.end; ++m) fetch(m, first);
      const Multiply<L, R> multiply = multiply_for<L, R, Left::kPacked>(count, vectors);
      const L* left = a.tile(tile_rows.begin, k);
      for (int g = 0; g < kGates; ++g) {
        const R* panel = packed + g * gate_size + first * depth;
        const R* ahead = panel + kPrefetchBytes / static_cast<int>(sizeof(R));
        int64_t ahead_step = vectors * kLanes<T> * kPair<R>;
        if (uncached && tile > 0) {  // each tile but the first prefetches its slice of the next panel
          ahead_step /= tiles.count - 1;
          ahead = packed + g * gate_size + next * depth + (tile - 1) * (depth / kPair<R>)*ahead_step;
        }
        multiply(left, a.stride, k, panel, sums + g * kSums, ahead, ahead_step);
      }
      for (int m = 0; m < count; ++m) {
        const T* row = sums + m * vectors * kLanes<T>;
        for_each_vector<T>(width, [&](int64_t j, int lanes) {
          Vec<T> values[kGates];
          for (int g = 0; g < kGates; ++g) values[g] = load(row + g * kSums + j);
          finish(tile_rows.begin + m, first + j, values, lanes);
        });
      }
    }
  }
}

// gates_product of one matrix: finish(row, column, value, lanes).
template <typename R, typename Left, typename Fetch, typename Finish>
static inline void product(Left a, int64_t rows, int64_t k, const R* packed, int64_t cols, Panels panels, Fetch fetch,
                           Finish finish) {
  gates_product<1>(
      a, rows, k, packed, 0, cols, panels, fetch,
      [&](int64_t row, int64_t col, Vec<Compute<R>>(&value)[1], int lanes) { finish(row, col, value[0], lanes); });
}

// The product of many rows of S, `stride` apart, in blocks of MC rows that stay in the L2 cache while all panels pass.
// `space` has room for a block of L, to convert to if S is another type.
template <typename L, typename S, typename R, typename Finish>
static inline void long_product(const S* a, int64_t stride, int64_t rows, int64_t k, const R* packed, int64_t cols,
                                L* space, Finish finish) {
  const auto nothing = [](int64_t, int64_t) {};
  const int64_t block = mc_rows<L>(k);
  for (int64_t begin = 0; begin < rows; begin += block) {
    const int64_t count = rows - begin < block ? rows - begin : block;
    Rows<L> left;
    if constexpr (kSame<S, L>) {
      left = {a + begin * stride, stride};
    } else {
      for (int64_t i = 0; i < count; ++i) convert(a + (begin + i) * stride, space + i * k, k);
      left = {space, k};
    }
    product(
        left, count, k, packed, cols, Panels{{0, panels_of<Compute<R>>(cols)}}, nothing,
        [&](int64_t row, int64_t col, Vec<Compute<R>> value, int lanes) { finish(begin + row, col, value, lanes); });
  }
}

// long_product without conversion, stored to `out` [rows, cols]. In functions that are not inlined, `finish` captures
// by value, so that the compiler need not read references again after each store.
template <typename L, typename R, typename S>
__attribute__((noinline)) static void store_product(const L* a, int64_t stride, int64_t rows, int64_t k,
                                                    const R* packed, int64_t cols, S* out) {
  long_product(a, stride, rows, k, packed, cols, static_cast<L*>(nullptr),
               [=](int64_t row, int64_t col, Vec<Compute<R>> value, int lanes) {
                 store_partial(out + row * cols + col, value, lanes);
               });
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
