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
    product_unpacked(p.grad_y, O, N, O, p.w, I, p.dx, I, team.slice(I, kLanes<S>));
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
