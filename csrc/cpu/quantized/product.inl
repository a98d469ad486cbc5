// Products with packed weights of 8 or 16 bits: float rows become left factors, which meet one panel at a time.
//
// int8 weights: a row of factors is rounded to int16 with one scale, so that int32 sums are exact in any order. The
// factor of a sum is applied to the float that it is rounded to. BFloat16 weights are widened to float.
#pragma once

#include "cpu/gemm/blocking.inl"
#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"
#include "cpu/simd/float16.inl"
#include "cpu/simd/int8.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Multiply-adds that are worth one more thread: as in gemm/blocking.inl, where they take about twice as long.
constexpr double kQuantizedWorkPerThread = 2 * kWorkPerThread;

constexpr int kPanelVectors = static_cast<int>(kQuantizedPanel) / kLanes<float>;
// Rows of a tile: their sums fill the register file beside the weights. Fewer are not faster: docs/lab/quantization.md.
constexpr int kTileRows = LLM_EXT_VECTOR_BYTES == 64 ? 8 : (LLM_EXT_VECTOR_BYTES == 32 ? 6 : 2);

// Left factors of a product: rows of L, and for int8 weights the scale of each.
template <typename L>
struct LeftRows {
  const L* data;
  int64_t stride;
  const float* scale;
};

// How weights of W are multiplied.
template <typename W>
struct Arithmetic;

template <>
struct Arithmetic<int8_t> {
  using Left = int16_t;
  using Sum = IntVec<float>;

  static Int16Vec load_weights(const int8_t* p) { return load_int8(p); }
  static Int16Vec load_left(const int16_t* p) { return broadcast_pair(p); }
  static Sum multiply_add(Sum sum, Int16Vec a, Int16Vec b) { return add_pairs(sum, a, b); }
  static Vec<float> finish(Sum sum, float row_scale, const float* scale, int lanes) {
    return __builtin_convertvector(sum, Vec<float>) * row_scale * load_partial(scale, lanes);
  }

  static int64_t stride(int64_t k) { return divide_up(k, 2) * 2; }

  // The largest int16 factor of a row of k numbers: k products with 127 fit into int32.
  static int32_t limit(int64_t k) {
    const int64_t fitting = (int64_t(1) << 31) / 127 / (k > 0 ? k : 1);
    return static_cast<int32_t>(fitting < 32767 ? fitting : 32767);
  }

  // A row whose largest magnitude is below 1e-30 counts as zero, and one with NaN or infinity becomes NaN.
  static LeftRows<Left> prepare(const float* x, int64_t x_stride, int64_t rows, int64_t k, float* space) {
    const int64_t width = stride(k);
    float* scales = space;
    Left* factors = reinterpret_cast<Left*>(space + aligned(rows));
    const float most = static_cast<float>(limit(k));
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = x + r * x_stride;
      Left* out = factors + r * width;
      const float magnitude = largest_magnitude(row, k);
      const bool usable = magnitude >= 1e-30f && magnitude < infinity<float>();
      scales[r] = usable ? magnitude / most : (magnitude < infinity<float>() ? 0.0f : __builtin_nanf(""));
      if (usable) {
        round_to_int16(row, k, most / magnitude, out);
        if (width > k) out[k] = 0;
      } else {
        zero(out, width);
      }
    }
    return {factors, width, scales};
  }

  static int64_t space(int64_t rows, int64_t k) {
    return aligned(rows) + aligned(divide_up(rows * stride(k), sizeof(float) / sizeof(Left)));
  }
};

template <>
struct Arithmetic<BFloat16> {
  using Left = float;
  using Sum = Vec<float>;

  static Vec<float> load_weights(const BFloat16* p) { return load(p); }
  static Vec<float> load_left(const float* p) { return broadcast(*p); }
  // Fused where the ISA can, since the compiler is told not to contract.
  static Sum multiply_add(Sum sum, Vec<float> a, Vec<float> b) {
#if LLM_EXT_VECTOR_BYTES == 64
    return (Sum)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif LLM_EXT_VECTOR_BYTES == 32
    return (Sum)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
  }
  static Vec<float> finish(Sum sum, float, const float*, int) { return sum; }

  static LeftRows<Left> prepare(const float* x, int64_t x_stride, int64_t, int64_t, float*) {
    return {x, x_stride, nullptr};
  }
  static int64_t space(int64_t, int64_t) { return 0; }
};

// Elements of W in a panel of one gate.
template <typename W>
static inline int64_t panel_size(int64_t k) {
  return divide_up(k, kQuantizedDepth<W>) * kQuantizedDepth<W> * kQuantizedPanel;
}

// sums[m][v] = sum over k of row m of the left factors times column v of a panel. With few sums, they are split over
// several sets to cover the latency of a multiply-add.
template <typename W, int M>
__attribute__((noinline)) static void multiply_panel(const typename Arithmetic<W>::Left* left, int64_t stride,
                                                     int64_t k, const W* panel,
                                                     typename Arithmetic<W>::Sum (*sums)[kPanelVectors]) {
  using A = Arithmetic<W>;
  constexpr int kDepth = kQuantizedDepth<W>;
  constexpr int kSums = M * kPanelVectors;
  constexpr int kSets = kSums >= 8 ? 1 : (kSums >= 4 ? 2 : 4);
  typename A::Sum acc[kSets][M][kPanelVectors] = {};
  const auto accumulate = [&](typename A::Sum(&set)[M][kPanelVectors], int64_t i) {
    decltype(A::load_weights(panel)) weights[kPanelVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      weights[v] = A::load_weights(panel + (i * kQuantizedPanel + v * kLanes<float>)*kDepth);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const auto factor = A::load_left(left + m * stride + i * kDepth);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) set[m][v] = A::multiply_add(set[m][v], factor, weights[v]);
    }
  };
  const int64_t units = divide_up(k, kDepth);
  int64_t i = 0;
  for (; i + kSets <= units; i += kSets) {
#pragma GCC unroll 4
    for (int s = 0; s < kSets; ++s) accumulate(acc[s], i + s);
  }
  for (; i < units; ++i) accumulate(acc[0], i);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
#pragma GCC unroll 4
      for (int s = 1; s < kSets; ++s) acc[0][m][v] += acc[s][m][v];
      sums[m][v] = acc[0][m][v];
    }
  }
}

template <typename W>
using MultiplyPanel = void (*)(const typename Arithmetic<W>::Left*, int64_t, int64_t, const W*,
                               typename Arithmetic<W>::Sum (*)[kPanelVectors]);

template <typename W>
static inline MultiplyPanel<W> multiply_panel_for(int m) {
#define LLM_EXT_TILE(M) multiply_panel<W, M>
  static constexpr MultiplyPanel<W> kTable[kTileRows] = {
      LLM_EXT_TILE(1), LLM_EXT_TILE(2),
#if LLM_EXT_VECTOR_BYTES >= 32
      LLM_EXT_TILE(3), LLM_EXT_TILE(4), LLM_EXT_TILE(5), LLM_EXT_TILE(6),
#endif
#if LLM_EXT_VECTOR_BYTES == 64
      LLM_EXT_TILE(7), LLM_EXT_TILE(8),
#endif
  };
#undef LLM_EXT_TILE
  return kTable[m - 1];
}

// The rows of `left`, of k numbers, times `panels` of a matrix of kGates blocks of `block_rows` rows. Calls
// finish(row, column, values, lanes) with one vector of each gate. Panels are read backwards if asked: repeated
// products should alternate, so that the panels which a cache still holds come first.
template <typename W, int kGates, typename Finish>
static inline void panels_product(LeftRows<typename Arithmetic<W>::Left> left, int64_t rows, int64_t k,
                                  QuantizedMatrix<W> w, int64_t block_rows, Range panels, bool backwards,
                                  Finish finish) {
  using A = Arithmetic<W>;
  typename A::Sum sums[kGates][kTileRows][kPanelVectors];
  const Tiles tiles(rows, kTileRows, kTileRows);
  const int64_t size = panel_size<W>(k);
  for (int64_t i = panels.begin; i < panels.end; ++i) {
    const int64_t p = backwards ? panels.end - 1 - (i - panels.begin) : i;
    const int64_t first = p * kQuantizedPanel;
    const int64_t width = block_rows - first < kQuantizedPanel ? block_rows - first : kQuantizedPanel;
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const Range tile_rows = tiles[tile];
      const int count = static_cast<int>(tile_rows.size());
      const MultiplyPanel<W> multiply = multiply_panel_for<W>(count);
      for (int g = 0; g < kGates; ++g) {
        multiply(left.data + tile_rows.begin * left.stride, left.stride, k, w.packed + (p * kGates + g) * size,
                 sums[g]);
      }
      for (int m = 0; m < count; ++m) {
        const int64_t row = tile_rows.begin + m;
        const float row_scale = left.scale == nullptr ? 1.0f : left.scale[row];
        for_each_vector<float>(width, [&](int64_t j, int lanes) {
          Vec<float> values[kGates];
          for (int g = 0; g < kGates; ++g) {
            const float* scale = w.scale == nullptr ? nullptr : w.scale + g * block_rows + first + j;
            values[g] = A::finish(sums[g][m][j / kLanes<float>], row_scale, scale, lanes);
          }
          finish(row, first + j, values, lanes);
        });
      }
    }
  }
}

// panels_product of rows of float, in blocks of MC rows that stay in the L2 cache while all panels pass. `space` has
// blocked_space() elements.
template <typename W, int kGates, typename Finish>
static inline void blocked_product(const float* x, int64_t rows, int64_t k, QuantizedMatrix<W> w, int64_t block_rows,
                                   Range panels, float* space, Finish finish) {
  const int64_t block = mc_rows<typename Arithmetic<W>::Left>(k);
  for (int64_t begin = 0; begin < rows; begin += block) {
    const int64_t count = rows - begin < block ? rows - begin : block;
    const auto left = Arithmetic<W>::prepare(x + begin * k, k, count, k, space);
    panels_product<W, kGates>(left, count, k, w, block_rows, panels, false,
                              [&](int64_t row, int64_t col, Vec<float>(&values)[kGates], int lanes) {
                                finish(begin + row, col, values, lanes);
                              });
  }
}

template <typename W>
static inline int64_t blocked_space(int64_t rows, int64_t k) {
  const int64_t block = mc_rows<typename Arithmetic<W>::Left>(k);
  return Arithmetic<W>::space(rows < block ? rows : block, k);
}

// How a team divides the product of `rows` rows with `panels` panels: by rows if there are enough for whole tiles.
struct ProductSlice {
  Range rows;
  Range panels;
};
static inline ProductSlice slice_product(int64_t rows, int64_t panels, const ThreadTeam& team) {
  if (rows >= kTileRows * team.size) return {team.slice(rows, kTileRows), {0, panels}};
  return {{0, rows}, team.slice(panels)};
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
