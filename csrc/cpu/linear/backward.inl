// Gradients of y = x W^T + b.
#pragma once

#include "cpu/gemm/blocking.inl"
#include "cpu/gemm/gemm.inl"
#include "cpu/gemm/gemv.inl"
#include "cpu/gemm/packing.inl"
#include "cpu/gemm/weight_gradients.inl"
#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/traits.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Up to this many rows, dx = dy W uses the unpacked W. Zen 5: docs/lab/cpu-constants.md.
constexpr int64_t kUnpackedGradientRows = 32;

// dx = grad_y W for few rows: each panel of columns is read for all tiles of rows while it is in the cache.
template <typename S>
static inline void input_gradient_unpacked(const LinearBackwardParams<S>& p, Range columns) {
  const int64_t N = p.sizes.rows, I = p.sizes.input, O = p.sizes.output;
  const Tiles tiles(N, kMR, kMR);
  const auto block = [&](auto vectors, int64_t col, int lanes) {
    constexpr int NV = decltype(vectors)::value;
    using Block = void (*)(const S*, int64_t, int64_t, const S*, int64_t, S*, int64_t, int);
    static constexpr Block kTable[kMR] = {multiply_unpacked<S, 1, NV>, multiply_unpacked<S, 2, NV>,
                                          multiply_unpacked<S, 3, NV>, multiply_unpacked<S, 4, NV>,
                                          multiply_unpacked<S, 5, NV>, multiply_unpacked<S, 6, NV>};
    for (int64_t i = 0; i < tiles.count; ++i) {
      const Range rows = tiles[i];
      kTable[rows.size() - 1](p.grad_y + rows.begin * O, O, O, p.w + col, I, p.dx + rows.begin * I + col, I, lanes);
    }
  };
  int64_t col = columns.begin;
  for (; col + kNR<S> <= columns.end; col += kNR<S>) block(Constant<kNRVectors>{}, col, kLanes<S>);
  for (; col < columns.end; col += kLanes<S>) {
    const int64_t left = columns.end - col;
    block(Constant<1>{}, col, left < kLanes<S> ? static_cast<int>(left) : kLanes<S>);
  }
}

// Sizes of the arrays in the workspace, in this order in memory, in elements of S.
template <typename S>
struct LinearBackwardWorkspace {
  LinearBackwardWorkspace(const LinearSizes& s, int threads)
      : packed(s.rows <= kUnpackedGradientRows ? 0
                                               : divide_up(packed_size<S>(s.input, s.output), kLanes<S>) * kLanes<S>),
        total(packed + threads * kGradientWorkspace<S>) {}

  int64_t packed;  // W, for dx
  int64_t total;   // with the packed blocks of the weight gradient, per thread
};

template <typename S>
static int64_t linear_backward_workspace(const LinearSizes& s, int threads) {
  return LinearBackwardWorkspace<S>(s, threads).total;
}

template <typename S>
static void linear_backward(const LinearBackwardParams<S>& p, const ThreadTeam& team) {
  const int64_t N = p.sizes.rows, I = p.sizes.input, O = p.sizes.output;
  const LinearBackwardWorkspace<S> sizes(p.sizes, team.size);
  if (p.dx != nullptr && N <= kUnpackedGradientRows) {
    input_gradient_unpacked(p, team.slice(I, kLanes<S>));
  } else if (p.dx != nullptr) {
    pack_rows(WeightRows<S>{p.w, I, O}, I, O, team.slice(panels_of<S>(I)), p.workspace);
    team.sync();
    const Range rows = team.slice(N, kMR);
    store_product(p.grad_y + rows.begin * O, O, rows.size(), O, p.workspace, I, p.dx + rows.begin * I);
  }
  const auto nothing_gathered = [](int64_t) { return [](int64_t) { return static_cast<const S*>(nullptr); }; };
  const WeightGradient<S> dw = {p.dw, I, {0}, false, p.x, I};
  weight_gradients<S>(nothing_gathered, {0, N}, p.grad_y, O, 1, {dw}, false,
                      p.workspace + sizes.packed + team.rank * kGradientWorkspace<S>, team);
  const Range columns = team.slice(O, kLanes<S>);
  if (p.db != nullptr) {
    column_sums(p.grad_y + columns.begin, N, O, columns.size(), p.db + columns.begin, static_cast<S*>(nullptr), false);
  }
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
