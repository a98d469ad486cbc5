// The forward pass of additive attention.
#pragma once

#include "cpu/attention/row.inl"
#include "cpu/attention/workspace.inl"
#include "cpu/isa/isa.h"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/vec.inl"
#include "cpu/simd/vec_math.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// The softmax of a tile, one query per lane.
template <typename S, typename T = Compute<S>>
static inline void tile_softmax(const AdditiveRow<S>& row) {
  for (int64_t q = 0; q < row.queries; q += kLanes<T>) {
    T* scores = row.w.scores + q;
    const Vec<T> scale = tile_exponentials(row, scores);
    for (int64_t k = 0; k < row.count; ++k) {
      store(scores + k * kQueryTile, load(scores + k * kQueryTile) * scale);
    }
  }
}

// Weighted means of the values for `queries` queries from q on: `vectors` vectors of columns from d on, each of `lanes`
// lanes.
template <int queries, int vectors, typename S>
static inline void weighted_means(const AdditiveRow<S>& row, int64_t q, int64_t d, int lanes, S* context) {
  using T = Compute<S>;
  Vec<T> sums[vectors][queries] = {};
  for (int64_t k = 0; k < row.count; ++k) {
    const S* values = row.value(k) + d;
    const T* weights = row.w.scores + k * kQueryTile + q;
#pragma GCC unroll 16
    for (int i = 0; i < vectors; ++i) {
      const Vec<T> value = load_partial(values + i * kLanes<T>, lanes);
#pragma GCC unroll 8
      for (int j = 0; j < queries; ++j) sums[i][j] += weights[j] * value;
    }
  }
  for (int i = 0; i < vectors; ++i) {
    for (int j = 0; j < queries; ++j) {
      store_partial(context + j * row.in.value_dim + d + i * kLanes<T>, sums[i][j], lanes);
    }
  }
}

// One workspace per thread: if fewer threads start than were asked for, the split may be another.
template <typename S>
static int64_t additive_forward_workspace(const AdditiveAttentionInput<S>& in, int threads) {
  return threads * AdditiveWorkspace<Compute<S>>(in, false).size();
}

template <typename S>
static void additive_forward(const AdditiveAttentionForwardParams<S>& p, const ThreadTeam& team) {
  using T = Compute<S>;
  for_each_row(p.in, false, p.workspace, team, [&](AdditiveRow<S>& row) {
    const AdditiveAttentionInput<S>& in = row.in;
    const Range columns = row.team.slice(in.value_dim, kLanes<T>);
    for (int64_t first = 0; first < in.queries; first += kQueryTile) {
      row.begin_tile(first, in.queries - first < kQueryTile ? in.queries - first : kQueryTile);
      row.team.sync();
      row.score();
      row.team.sync();
      const int64_t offset = row.b * in.queries + first;
      if (row.team.rank == 0) tile_softmax(row);
      row.team.sync();
      for_each_block<kWideBlock>(row.queries, [&](int64_t q, auto size) {
        // With fewer queries, more columns: values are read in longer runs.
        constexpr int kVectors = kColumnSums / size.value;
        S* context = p.context + (offset + q) * in.value_dim;
        int64_t d = columns.begin;
        for (; d + kVectors * kLanes<T> <= columns.end; d += kVectors * kLanes<T>) {
          weighted_means<size.value, kVectors>(row, q, d, kLanes<T>, context);
        }
        for_each_vector<T>(columns.end - d,
                           [&](int64_t i, int lanes) { weighted_means<size.value, 1>(row, q, d + i, lanes, context); });
      });
      if (p.weights != nullptr && row.team.rank == 0) {
        zero(p.weights + offset * in.keys, row.queries * in.keys);
        for (int64_t q = 0; q < row.queries; ++q) {
          for (int64_t k = 0; k < row.count; ++k) {
            store_partial(p.weights + row.pair(q, k), broadcast(row.w.scores[k * kQueryTile + q]), 1);
          }
        }
      }
    }
  });
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
