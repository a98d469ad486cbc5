// y = x W^T + b of rows, and the index of the maximum of each row of y.
#pragma once

#include "cpu/gemm/blocking.inl"
#include "cpu/gemm/gemm.inl"
#include "cpu/gemm/gemv.inl"
#include "cpu/gemm/packing.inl"
#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/vec.inl"
#include "cpu/simd/vec_math.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Whether W is packed first: if there are many rows relative to its columns. Zen 5: docs/lab/cpu-constants.md.
template <typename S>
static bool packs_linear(const LinearSizes& s) {
  return s.rows > 4 * kDotRows && s.rows > s.output / 2;
}

template <typename S>
static int64_t linear_forward_workspace(const LinearSizes& s) {
  return packs_linear<S>(s) ? packed_size<S>(s.output, s.input) : 0;
}

// x W^T. Calls finish(row, column, value, lanes) for each vector of the result. `space` has room for the packed W.
template <typename S, typename Finish>
static inline void linear_product(const LinearSizes& s, const S* x, const S* w, S* space, const ThreadTeam& team,
                                  Finish finish) {
  const int64_t N = s.rows, I = s.input, O = s.output;
  if (packs_linear<S>(s)) {
    pack_transposed(WeightRows<S>{w, I, O}, O, I, team.slice(panels_of<S>(O)), space);
    team.sync();
    const Range rows = team.slice(N, kMR);
    return long_product(
        x + rows.begin * I, I, rows.size(), I, space, O, static_cast<S*>(nullptr),
        [&](int64_t row, int64_t col, Vec<S> value, int lanes) { finish(rows.begin + row, col, value, lanes); });
  }
  const Range columns = team.slice(O, kLanes<S>);
  const int64_t block = mc_rows<S>(I);
  for (int64_t begin = 0; begin < N; begin += block) {
    const Tiles tiles(N - begin < block ? N - begin : block, kDotRows, kDotRows);
    for_each_vector<S>(columns.size(), [&](int64_t j, int lanes) {
      const int64_t col = columns.begin + j;
      for (int64_t i = 0; i < tiles.count; ++i) {
        const Range rows = {begin + tiles[i].begin, begin + tiles[i].end};
        Vec<S> values[kDotRows];
        row_dots<S>(DotFactors<S, S>{x + rows.begin * I, I, w + col * I, I, I}, DotFactors<S, S>{}, rows.size(), lanes,
                    values);
        for (int64_t r = rows.begin; r < rows.end; ++r) finish(r, col, values[r - rows.begin], lanes);
      }
    });
  }
}

template <typename S>
static void linear_forward(const LinearForwardParams<S>& p, const ThreadTeam& team) {
  const int64_t O = p.sizes.output;
  linear_product(p.sizes, p.x, p.w, p.workspace, team, [&](int64_t row, int64_t col, Vec<S> value, int lanes) {
    if (p.b != nullptr) value += load_partial(p.b + col, lanes);
    if (p.addend != nullptr) value += load_partial(p.addend + row * O + col, lanes);
    if (p.tanh) value = vec_tanh<S>(value);
    store_partial(p.y + row * O + col, value, lanes);
  });
}

// For each lane, over the columns that a thread has seen in it: the maximum, and the first column of its vector; -1 if
// the lane has seen none.
template <typename S>
struct Largest {
  Vec<S> value;
  IntVec<S> begin;
};

// The workspace of linear_argmax: the packed W, then one Largest per thread and row. Sizes in elements of S.
template <typename S>
struct LinearArgmaxWorkspace {
  static constexpr int64_t kSize = sizeof(Largest<S>) / sizeof(S);

  LinearArgmaxWorkspace(const LinearSizes& s, int threads)
      : packed(divide_up(linear_forward_workspace<S>(s), kSize) * kSize), total(packed + threads * s.rows * kSize) {}

  int64_t packed;
  int64_t total;
};

template <typename S>
static int64_t linear_argmax_workspace(const LinearSizes& s, int threads) {
  return LinearArgmaxWorkspace<S>(s, threads).total;
}

template <typename S>
static void linear_argmax(const LinearArgmaxParams<S>& p, const ThreadTeam& team) {
  const int64_t N = p.sizes.rows;
  // One thread computes all columns of a row if W is packed, else each thread some columns of every row.
  auto* const all = reinterpret_cast<Largest<S>*>(p.workspace + LinearArgmaxWorkspace<S>(p.sizes, team.size).packed);
  Largest<S>* const own = all + team.rank * N;
  for (int64_t r = 0; r < N; ++r) own[r] = {broadcast(-infinity<S>()), IntVec<S>{} - 1};
  IntVec<S> lane{};
  for (int i = 0; i < kLanes<S>; ++i) lane[i] = i;
  linear_product(p.sizes, p.x, p.w, p.workspace, team, [&](int64_t row, int64_t col, Vec<S> value, int lanes) {
    if (p.b != nullptr) value += load_partial(p.b + col, lanes);
    Largest<S>& best = own[row];
    // The first vector counts even if it is -infinity.
    auto taken = value > best.value || value != value || best.begin < 0;
    if (lanes < kLanes<S>) taken = taken && lane < lanes;
    best.value = taken ? value : best.value;
    best.begin = taken ? IntVec<S>{} + static_cast<int>(col) : best.begin;
  });
  team.sync();
  const Range rows = team.slice(N);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    S value = S(0);
    int64_t index = -1;
    for (int t = 0; t < team.size; ++t) {
      const Largest<S>& best = all[t * N + r];
      for (int i = 0; i < kLanes<S>; ++i) {
        if (best.begin[i] < 0) continue;
        const S other = best.value[i];
        const int64_t column = best.begin[i] + i;
        const bool larger = other > value || (other != other && value == value);
        if (index < 0 || larger || (other == value && column < index)) value = other, index = column;
      }
    }
    p.indices[r] = index;
  }
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
