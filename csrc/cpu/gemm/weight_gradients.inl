// Gradients of weights and biases: sums over all rows of a sequence.
#pragma once

#include "cpu/gemm/blocking.inl"
#include "cpu/gemm/gemm.inl"
#include "cpu/gemm/packing.inl"
#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// A weight gradient: the sum over all rows of left(row)^T right(row). left is dz, right the input of the product.
template <typename S>
struct WeightGradient {
  Compute<S>* dw;  // [gates * height, width]; null: not needed
  int64_t width;   // of a row of right
  int gates[4];    // for each block of left, the block of `height` rows of dw that it belongs to; -1: none
  bool gathered;   // rows of right come from `gather`, not from `right`
  const S* right;  // [N, width], `stride` apart
  int64_t stride;
};

// The weight gradients of `rows`, whose left rows [*, blocks * height] are at `left_rows`. Adds to the gradients if
// `more`, else overwrites them. gather(first) returns a function that is called with i = 0, 1, ... for rows first + i
// of a gathered right side; null means zeros. Gradients with the same left side are one product with their right sides
// next to each other, so that left is packed once.
template <typename S, int kSides, typename Gather>
static void weight_gradients(Gather gather, Range rows, const Factor<S>* left_rows, int64_t height, int blocks,
                             const WeightGradient<S> (&sides)[kSides], bool more, Factor<S>* space,
                             const ThreadTeam& team) {
  using T = Compute<S>;
  using L = Factor<S>;
  const int64_t n = rows.size();
  const int64_t left_width = blocks * height;
  Range side_panels[kSides];  // of each side among all panels
  Range panels = {0, 0};
  for (int j = 0; j < kSides; ++j) {
    const int64_t count = sides[j].dw == nullptr ? 0 : panels_of<T>(sides[j].width);
    side_panels[j] = {panels.end, panels.end + count};
    panels.end += count;
  }
  Range heights = {0, height};
  if (panels.end >= 2 * team.size) {
    panels = team.slice(panels.end);
  } else {
    heights = team.slice(height, kMR);
  }
  if (n == 0) {
    for (const WeightGradient<S>& side : sides) {
      if (side.dw == nullptr) continue;
      int used = 0;
      for (int b = 0; b < blocks; ++b) used += side.gates[b] >= 0;
      const Range slice = team.slice(used * height * side.width);
      __builtin_memset(side.dw + slice.begin, 0, slice.size() * sizeof(T));
    }
    return;
  }
  L* right = space;
  L* left = space + kGradientKC<T> * kGradientNCPanels * kNR<T>;
  for (int64_t i = 0; i < n; i += kGradientKC<T>) {
    const int64_t depth = n - i < kGradientKC<T> ? n - i : kGradientKC<T>;
    for (int64_t begin = panels.begin; begin < panels.end; begin += kGradientNCPanels) {
      const Range group = intersect({begin, begin + kGradientNCPanels}, panels);
      // Calls body(side, its panels in the group, their columns, their packed panels in `right`).
      const auto for_each_side = [&](auto body) {
        for (int j = 0; j < kSides; ++j) {
          const Range own = intersect(group, side_panels[j]);
          if (own.size() == 0) continue;
          const int64_t first = (own.begin - side_panels[j].begin) * kNR<T>;
          const Range columns = intersect({first, first + own.size() * kNR<T>}, {0, sides[j].width});
          body(sides[j], Range{0, own.size()}, columns, right + (own.begin - group.begin) * kNR<T> * padded<L>(depth));
        }
      };
      for_each_side([&](const WeightGradient<S>& side, Range packed_panels, Range columns, L* packed) {
        for (int64_t j = packed_panels.begin; j < packed_panels.end; ++j) {
          auto gathered = gather(rows.begin + i);
          const auto row = [&](int64_t k) -> const S* {
            const S* source = side.gathered ? gathered(k) : side.right + (rows.begin + i + k) * side.stride;
            return source == nullptr ? nullptr : source + columns.begin;
          };
          pack_rows(row, columns.size(), depth, {j, j + 1}, packed);
        }
      });
      for (int b = 0; b < blocks; ++b) {
        for (int64_t r = heights.begin; r < heights.end; r += kGradientMC) {
          const Range block = intersect({r, r + kGradientMC}, heights);
          pack_columns(left_rows + i * left_width, left_width, depth,
                       {b * height + block.begin, b * height + block.end}, left);
          for_each_side([&](const WeightGradient<S>& side, Range packed_panels, Range columns, const L* packed) {
            if (side.gates[b] < 0) return;
            T* target = side.dw + (side.gates[b] * height + r) * side.width + columns.begin;
            product(
                PackedColumns<L>{left}, block.size(), depth, packed, columns.size(), Panels{packed_panels},
                [&](int64_t m, int64_t col) { __builtin_prefetch(target + m * side.width + col, 1); },
                [&](int64_t m, int64_t col, Vec<T> value, int lanes) {
                  T* out = target + m * side.width + col;
                  store_partial(out, i == 0 && !more ? value : value + load_partial(out, lanes), lanes);
                });
          });
        }
      }
    }
  }
}

// Column sums of n rows, `stride` apart, into `first` and `second`, either of which may be null. Adds to them if
// `more`. The calling thread computes all of `width`.
template <typename T, typename L>
static void column_sums(const L* rows, int64_t n, int64_t stride, int64_t width, T* first, T* second, bool more) {
  constexpr int64_t kSums = 8;
  constexpr int64_t kWidth = kSums * kLanes<T>;
  if (first == nullptr) first = second;
  if (second == nullptr) second = first;
  if (first == nullptr) return;
  for (int64_t c = 0; c < width; c += kWidth) {
    const int64_t count = width - c < kWidth ? width - c : kWidth;
    Vec<T> sums[kSums] = {};
    for_each_vector<T>(count, [&](int64_t j, int lanes) {
      if (more) sums[j / kLanes<T>] = load_partial(first + c + j, lanes);
    });
    for (int64_t i = 0; i < n; ++i) {
      for_each_vector<T>(
          count, [&](int64_t j, int lanes) { sums[j / kLanes<T>] += load_partial(rows + i * stride + c + j, lanes); });
    }
    for_each_vector<T>(count, [&](int64_t j, int lanes) {
      store_partial(first + c + j, sums[j / kLanes<T>], lanes);
      store_partial(second + c + j, sums[j / kLanes<T>], lanes);
    });
  }
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
