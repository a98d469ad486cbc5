// Products with packed weights of 8 or 16 bits: float rows become left factors, which meet one or several panels.
//
// int8 weights: a row of factors is rounded to integers with one scale, so that int32 sums are exact in any order. A
// sum is rounded to float and multiplied by the scales of the row and of the weight. Inputs become int16, states bytes.
// BFloat16 weights are widened to float, or meet rows that are rounded to pairs of BFloat16 where the ISA multiplies
// these.
#pragma once

#include "cpu/gemm/blocking.inl"
#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"
#include "cpu/simd/float16.inl"
#include "cpu/simd/int8.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/traits.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Multiply-adds that are worth one more thread: as in gemm/blocking.inl, where they take about twice as long.
constexpr double kQuantizedWorkPerThread = 2 * kWorkPerThread;

constexpr int kPanelVectors = static_cast<int>(kQuantizedPanel) / kLanes<float>;

// Panels that are multiplied at once: those of the gates, or as many of one gate.
template <int kGates>
constexpr int kPanelsAtOnce = kGates > 1 ? kGates : 4;
// The sums of panels that are multiplied at once, so that they share the broadcasts of left factors. With more rows,
// one panel after the other. The baseline has no registers for it.
constexpr int kSharedSums = LLM_EXT_VECTOR_BYTES == 64 ? 24 : (LLM_EXT_VECTOR_BYTES == 32 ? 8 : 0);
// With one row, up to this k: a single long panel streams faster from the L2 cache. Zen 5: docs/lab/quantization.md.
constexpr int64_t kSharedDepth = 64;
// Rows of a tile: their sums fill the register file beside the weights.
constexpr int kMostRows = LLM_EXT_VECTOR_BYTES == 64 ? 8 : (LLM_EXT_VECTOR_BYTES == 32 ? 6 : 2);
template <typename A, int kGates>
constexpr int kTileRows = LLM_EXT_VECTOR_BYTES == 64 ? kSharedSums / kPanelsAtOnce<kGates> : A::kRows;

// Left factors of a product: rows of L, and for int8 weights the scale of each.
template <typename L>
struct LeftRows {
  const L* data;
  int64_t stride;
  const float* scale;
};

// Rows of K floats as integers of magnitude `most` at most. A row whose largest magnitude is below 1e-30 counts as
// zero, and one with NaN or infinity becomes NaN. round(row, inverse_scale, out) writes whole units, clear(out) those
// of zeros.
template <typename L, typename Round, typename Clear>
static inline LeftRows<L> round_rows(const float* x, int64_t x_stride, int64_t rows, int64_t k, int64_t width,
                                     float most, float* space, Round round, Clear clear) {
  float* scales = space;
  L* factors = reinterpret_cast<L*>(space + aligned(rows));
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x + r * x_stride;
    const float magnitude = largest_magnitude(row, k);
    const bool usable = magnitude >= 1e-30f && magnitude < infinity<float>();
    scales[r] = usable ? magnitude / most : (magnitude < infinity<float>() ? 0.0f : __builtin_nanf(""));
    if (!usable || width > k) clear(factors + r * width);
    if (usable) round(row, most / magnitude, factors + r * width);
  }
  return {factors, width, scales};
}

// Floats of memory for rows of `width` factors of type L and a scale each.
template <typename L>
static inline int64_t rounded_space(int64_t rows, int64_t width) {
  return aligned(rows) + aligned(divide_up(rows * width * static_cast<int64_t>(sizeof(L)), sizeof(float)));
}

// Three ways to multiply. A unit is kDepth numbers of each column, which are multiplied in kParts parts; kFirst units
// of a panel hold the numbers with which its sums begin; without AVX-512 a tile has up to kRows rows.

// int8 weights and rows of int16.
struct WordProduct {
  using Weight = int8_t;
  using Left = int16_t;
  using Sum = IntVec<float>;
  static constexpr int kDepth = kInputDepth;
  static constexpr int kParts = 1;
  static constexpr int kFirst = 0;
  static constexpr int kRows = kMostRows;

  static Int16Vec load_weights(const int8_t* p, int) { return load_int8(p); }
  static Int16Vec load_left(const int16_t* p, int) { return (Int16Vec)broadcast_lane(p); }
  static Sum multiply_add(Sum sum, Int16Vec a, Int16Vec b) { return add_pairs(sum, a, b); }
  static Vec<float> finish(Sum sum, float row_scale, const float* scale, int lanes) {
    return __builtin_convertvector(sum, Vec<float>) * row_scale * load_partial(scale, lanes);
  }

  static int64_t stride(int64_t k) { return divide_up(k, kDepth) * kDepth; }

  // The largest factor: k products with 127 fit into int32.
  static int32_t limit(int64_t k) {
    const int64_t fitting = (int64_t(1) << 31) / 127 / (k > 0 ? k : 1);
    return static_cast<int32_t>(fitting < 32767 ? fitting : 32767);
  }

  static LeftRows<Left> prepare(const float* x, int64_t x_stride, int64_t rows, int64_t k, float* space) {
    return round_rows<Left>(
        x, x_stride, rows, k, stride(k), static_cast<float>(limit(k)), space,
        [=](const float* row, float inverse_scale, Left* out) { round_to_int16(row, k, inverse_scale, out); },
        [=](Left* out) { zero(out, stride(k)); });
  }
  static int64_t space(int64_t rows, int64_t k) { return rounded_space<Left>(rows, stride(k)); }
};

// int8 weights and rows of bytes.
struct ByteProduct {
  using Weight = int8_t;
  using Left = uint8_t;
  using Sum = IntVec<float>;
  static constexpr int kDepth = kStateDepth<int8_t>;
  static constexpr int kParts = 1;
  static constexpr int kFirst = 1;
  static constexpr int kRows = kMostRows;

  static Sum load_weights(const int8_t* p, int) {
    Sum bytes;
    __builtin_memcpy(&bytes, p, sizeof(bytes));
    return bytes;
  }
  static Sum load_left(const uint8_t* p, int) { return broadcast_lane(p); }
  static Sum multiply_add(Sum sum, Sum a, Sum b) { return add_fours(sum, a, b); }
  static Vec<float> finish(Sum sum, float row_scale, const float* scale, int lanes) {
    return WordProduct::finish(sum, row_scale, scale, lanes);
  }

  static int64_t stride(int64_t k) { return divide_up(k, kDepth) * kDepth; }

  static LeftRows<Left> prepare(const float* x, int64_t x_stride, int64_t rows, int64_t k, float* space) {
    return round_rows<Left>(
        x, x_stride, rows, k, stride(k), kByteOffset - 1, space,
        [=](const float* row, float inverse_scale, Left* out) {
          round_to_bytes(row, k, inverse_scale, kByteOffset, out);
        },
        [=](Left* out) { __builtin_memset(out, kByteOffset, stride(k)); });
  }
  static int64_t space(int64_t rows, int64_t k) { return rounded_space<Left>(rows, stride(k)); }
};

// BFloat16 weights.
struct PairProduct {
  using Weight = BFloat16;
  using Sum = Vec<float>;
  static constexpr int kDepth = kInputDepth;
  static constexpr int kFirst = 0;
  static_assert(kInputDepth == kStateDepth<BFloat16>);

#ifdef LLM_EXT_DOT_BF16
  using Left = BFloat16;
  static constexpr int kParts = 1;
  static constexpr int kRows = kMostRows;

  static Vec<float> load_weights(const BFloat16* p, int) { return load_pairs(p, 2 * kLanes<float>); }
  static Vec<float> load_left(const BFloat16* p, int) { return (Vec<float>)broadcast_lane(p); }
  static Sum multiply_add(Sum sum, Vec<float> a, Vec<float> b) {
    return (Sum)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  static int64_t stride(int64_t k) { return divide_up(k, kDepth) * kDepth; }
  static LeftRows<Left> prepare(const float* x, int64_t x_stride, int64_t rows, int64_t k, float* space) {
    Left* factors = reinterpret_cast<Left*>(space);
    for (int64_t r = 0; r < rows; ++r) {
      Left* out = factors + r * stride(k);
      convert(x + r * x_stride, out, k);
      if (stride(k) > k) out[k] = {0};
    }
    return {factors, stride(k), nullptr};
  }
  static int64_t space(int64_t rows, int64_t k) { return aligned(divide_up(rows * stride(k), 2)); }
#else
  using Left = float;
  static constexpr int kParts = 2;
  static constexpr int kRows = LLM_EXT_VECTOR_BYTES == 32 ? 5 : kMostRows;  // the mask takes a register

  static Vec<float> load_weights(const BFloat16* p, int part) {
    // Keeps loads behind the products of the part before: a tile leaves no registers for both.
    asm volatile("" ::: "memory");
    Bits32 pairs;
    __builtin_memcpy(&pairs, p, sizeof(pairs));
    return (Vec<float>)(part == 0 ? pairs << 16 : pairs & 0xffff0000u);
  }
  static Vec<float> load_left(const float* p, int part) { return broadcast(p[part]); }
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

  static LeftRows<Left> prepare(const float* x, int64_t x_stride, int64_t, int64_t, float*) {
    return {x, x_stride, nullptr};
  }
  static int64_t space(int64_t, int64_t) { return 0; }
#endif
  static Vec<float> finish(Sum sum, float, const float*, int) { return sum; }
};

// How weights of W are multiplied with inputs and with states.
template <typename W>
using InputProduct = Choose<sizeof(W) == 1, WordProduct, PairProduct>;
template <typename W>
using StateProduct = Choose<sizeof(W) == 1, ByteProduct, PairProduct>;

// Elements in a panel of one gate.
template <typename A>
static inline int64_t panel_size(int64_t k) {
  return (A::kFirst + divide_up(k, A::kDepth)) * A::kDepth * kQuantizedPanel;
}

// Sums of M rows of left factors with N panels.
template <typename A, int M, int N>
using Sums = typename A::Sum[N][M][kPanelVectors];

// Adds a part of the products of M rows of left factors with one unit of each of N panels, `size` apart.
template <typename A, int M, int N>
__attribute__((always_inline)) static inline void add_part(Sums<A, M, N>& sums, const typename A::Left* left,
                                                           int64_t stride, const typename A::Weight* unit, int64_t size,
                                                           int part) {
  decltype(A::load_weights(unit, part)) weights[N][kPanelVectors];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      weights[n][v] = A::load_weights(unit + n * size + v * kLanes<float> * A::kDepth, part);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const auto factor = A::load_left(left + m * stride, part);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) {
        sums[n][m][v] = A::multiply_add(sums[n][m][v], factor, weights[n][v]);
      }
    }
  }
}

// out [N][M][kPanelVectors]: sum over k of row m of the left factors times column v of panel n. With few sums, they are
// split over several sets to cover the latency of a multiply-add.
template <typename A, int M, int N>
__attribute__((always_inline)) static inline void multiply_at_once(const typename A::Left* left, int64_t stride,
                                                                   int64_t k, const typename A::Weight* panel,
                                                                   typename A::Sum* out) {
  constexpr int kSums = M * N * kPanelVectors;
  constexpr int kMostSums = LLM_EXT_VECTOR_BYTES == 64 ? 16 : A::kRows * kPanelVectors;
  constexpr int kSets = kSums < 4 || 4 * kSums <= kMostSums ? 4 : (2 * kSums <= kMostSums ? 2 : 1);
  constexpr int kUnit = A::kDepth * kQuantizedPanel;
  const int64_t size = panel_size<A>(k);
  Sums<A, M, N> acc[kSets] = {};
  if constexpr (A::kFirst > 0) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) __builtin_memcpy(acc[0][n][m], panel + n * size, sizeof(acc[0][n][m]));
    }
    panel += A::kFirst * kUnit;
  }
  // Left factors that are not rounded have no padding: of a last unit that is not full only the first part exists.
  const int64_t units = A::kParts == 1 ? divide_up(k, A::kDepth) : k / A::kDepth;
  int64_t i = 0;
  for (; i + kSets <= units; i += kSets) {
#pragma GCC unroll 4
    for (int s = 0; s < kSets; ++s) {
#pragma GCC unroll 2
      for (int part = 0; part < A::kParts; ++part) {
        add_part<A, M, N>(acc[s], left + (i + s) * A::kDepth, stride, panel + (i + s) * kUnit, size, part);
      }
    }
  }
  for (; i < units; ++i) {
#pragma GCC unroll 2
    for (int part = 0; part < A::kParts; ++part) {
      add_part<A, M, N>(acc[0], left + i * A::kDepth, stride, panel + i * kUnit, size, part);
    }
  }
  if (A::kParts > 1 && k % A::kDepth != 0) {
    add_part<A, M, N>(acc[0], left + units * A::kDepth, stride, panel + units * kUnit, size, 0);
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) {
#pragma GCC unroll 4
        for (int s = 1; s < kSets; ++s) acc[0][n][m][v] += acc[s][n][m][v];
        out[(n * M + m) * kPanelVectors + v] = acc[0][n][m][v];
      }
    }
  }
}

// multiply_at_once, or panel after panel.
template <typename A, int M, int N>
__attribute__((noinline)) static void multiply_panels(const typename A::Left* left, int64_t stride, int64_t k,
                                                      const typename A::Weight* panel, typename A::Sum* out) {
  if constexpr (N == 1 || M * N * kPanelVectors <= kSharedSums) {
    multiply_at_once<A, M, N>(left, stride, k, panel, out);
  } else {
    for (int n = 0; n < N; ++n) {
      multiply_panels<A, M, 1>(left, stride, k, panel + n * panel_size<A>(k), out + n * M * kPanelVectors);
    }
  }
}

template <typename A>
using MultiplyPanels = void (*)(const typename A::Left*, int64_t, int64_t, const typename A::Weight*, typename A::Sum*);

template <typename A, int kRows, int N>
static inline MultiplyPanels<A> multiply_panels_for(int m) {
#define LLM_EXT_TILE(M) multiply_panels<A, (M < kRows ? M : kRows), N>
  static constexpr MultiplyPanels<A> kTable[] = {
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
template <typename A, int kGates, typename Finish>
static inline void panels_product(LeftRows<typename A::Left> left, int64_t rows, int64_t k,
                                  QuantizedMatrix<typename A::Weight> w, int64_t block_rows, Range panels,
                                  bool backwards, Finish finish) {
  if (rows == 0) return;
  constexpr int kRows = kTileRows<A, kGates>, kAtOnce = kPanelsAtOnce<kGates>;
  typename A::Sum sums[kAtOnce * kMostRows * kPanelVectors];
  const Tiles tiles(rows, kRows, kRows);
  // Few rows: the sums of several panels come before finish() of any, whose latency a product would not hide.
  const int64_t step = kAtOnce / kGates * (rows <= kMostRows / 2 ? kMostRows / rows : 1);
  const bool together = rows > 1 || k <= kSharedDepth;
  const int64_t size = panel_size<A>(k), steps = divide_up(panels.size(), step);
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t begin = panels.begin + (backwards ? steps - 1 - i : i) * step;
    const int64_t end = begin + step < panels.end ? begin + step : panels.end;
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const Range tile_rows = tiles[tile];
      const int count = static_cast<int>(tile_rows.size());
      const auto* factors = left.data + tile_rows.begin * left.stride;
      const auto* packed = w.packed + begin * kGates * size;
      const int64_t wanted = (end - begin) * kGates;
      int64_t n = 0;
      for (; together && n + kAtOnce <= wanted; n += kAtOnce) {
        multiply_panels_for<A, kRows, kAtOnce>(count)(factors, left.stride, k, packed + n * size,
                                                      sums + n * count * kPanelVectors);
      }
      for (; n < wanted; ++n) {
        multiply_panels_for<A, kRows, 1>(count)(factors, left.stride, k, packed + n * size,
                                                sums + n * count * kPanelVectors);
      }
      for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p * kQuantizedPanel;
        const int64_t width = block_rows - first < kQuantizedPanel ? block_rows - first : kQuantizedPanel;
        const typename A::Sum* of_panel = sums + (p - begin) * kGates * count * kPanelVectors;
        for (int m = 0; m < count; ++m) {
          const int64_t row = tile_rows.begin + m;
          const float row_scale = left.scale == nullptr ? 1.0f : left.scale[row];
          for_each_vector<float>(width, [&](int64_t j, int lanes) {
            Vec<float> values[kGates];
            for (int g = 0; g < kGates; ++g) {
              const float* scale = w.scale == nullptr ? nullptr : w.scale + g * block_rows + first + j;
              values[g] =
                  A::finish(of_panel[(g * count + m) * kPanelVectors + j / kLanes<float>], row_scale, scale, lanes);
            }
            finish(row, first + j, values, lanes);
          });
        }
      }
    }
  }
}

// panels_product of rows of float, in blocks of MC rows that stay in the L2 cache while all panels pass. `space` has
// blocked_space() elements.
template <typename A, int kGates, typename Finish>
static inline void blocked_product(const float* x, int64_t rows, int64_t k, QuantizedMatrix<typename A::Weight> w,
                                   int64_t block_rows, Range panels, float* space, Finish finish) {
  const int64_t block = mc_rows<typename A::Left>(k);
  for (int64_t begin = 0; begin < rows; begin += block) {
    const int64_t count = rows - begin < block ? rows - begin : block;
    const auto left = A::prepare(x + begin * k, k, count, k, space);
    panels_product<A, kGates>(left, count, k, w, block_rows, panels, false,
                              [&](int64_t row, int64_t col, Vec<float>(&values)[kGates], int lanes) {
                                finish(begin + row, col, values, lanes);
                              });
  }
}

template <typename A>
static inline int64_t blocked_space(int64_t rows, int64_t k) {
  const int64_t block = mc_rows<typename A::Left>(k);
  return A::space(rows < block ? rows : block, k);
}

// How a team divides the product of `rows` rows with `panels` panels: by rows if there are enough for whole tiles.
struct ProductSlice {
  Range rows;
  Range panels;
};
static inline ProductSlice slice_product(int64_t rows, int64_t panels, const ThreadTeam& team) {
  if (rows >= kMostRows * team.size) return {team.slice(rows, kMostRows), {0, panels}};
  return {{0, rows}, team.slice(panels)};
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
