// The backward pass of additive attention. It recomputes the weights from the scores.
#pragma once

#include "cpu/attention/row.inl"
#include "cpu/attention/workspace.inl"
#include "cpu/isa/isa.h"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/vec.inl"
#include "cpu/simd/vec_math.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Weights from scores, and gradients of the scores from gradients of the weights:
// ds = weight (dweight - sum of weight dweight).
template <typename S, typename T = Compute<S>>
static inline void tile_softmax_backward(const AdditiveRow<S>& row) {
  for (int64_t q = 0; q < row.queries; q += kLanes<T>) {
    T* scores = row.w.scores + q;
    T* dscores = row.w.dscores + q;
    const Vec<T> scale = tile_exponentials(row, scores);
    Vec<T> sum{};
    for (int64_t k = 0; k < row.count; ++k) {
      const Vec<T> weight = load(scores + k * kQueryTile) * scale;
      store(scores + k * kQueryTile, weight);
      sum += weight * load(dscores + k * kQueryTile);
    }
    for (int64_t k = 0; k < row.count; ++k) {
      const Vec<T> weight = load(scores + k * kQueryTile);
      store(dscores + k * kQueryTile, weight * (load(dscores + k * kQueryTile) - sum));
    }
  }
}

// Dot products of gradients of the context with the values of kRowBlock keys.
template <int queries, typename S, typename T>
static inline void pair_products(const T* grad, int64_t width, const S* const* values, int64_t n,
                                 Vec<T> (&sums)[kRowBlock][queries]) {
  for_each_vector<T>(n, [&](int64_t d, int lanes) {
    Vec<T> g[queries];
#pragma GCC unroll 4
    for (int i = 0; i < queries; ++i) g[i] = load(grad + i * width + d);
#pragma GCC unroll 4
    for (int j = 0; j < kRowBlock; ++j) {
      const Vec<T> value = load_partial(values[j] + d, lanes);
#pragma GCC unroll 4
      for (int i = 0; i < queries; ++i) sums[j][i] += g[i] * value;
    }
  });
}

// The terms of a tile in the gradients of queries, keys and v, for this thread's vectors of A.
template <typename S, typename T = Compute<S>>
static inline void tile_gradients(const AdditiveAttentionBackwardParams<S>& p, const AdditiveRow<S>& row,
                                  Range vectors) {
  const AdditiveAttentionInput<S>& in = row.in;
  const AdditiveWorkspace<T>& w = row.w;
  for (int64_t vector = vectors.begin; vector < vectors.end; ++vector) {
    const int64_t a = vector * kLanes<T>;
    const int lanes = static_cast<int>(in.attn_dim - a < kLanes<T> ? in.attn_dim - a : kLanes<T>);
    const T* keys = w.keys + a * w.rows;
    T* dkeys = w.dkeys + a * w.rows;
    Vec<T> to_v{};  // of this tile only: nested sums have smaller rounding errors
    for_each_block<kRowBlock>(row.queries, [&](int64_t q, auto size) {
      Vec<T> queries[size.value], dqueries[size.value] = {};
#pragma GCC unroll 4
      for (int i = 0; i < size.value; ++i) queries[i] = load(w.query + a * kQueryTile + (q + i) * kLanes<T>);
      for (int64_t k = 0; k < row.count; ++k) {
        const Vec<T> key = load(keys + k * kLanes<T>);
        const T* dscores = w.dscores + k * kQueryTile + q;
        Vec<T> dkey = load(dkeys + k * kLanes<T>);
#pragma GCC unroll 4
        for (int i = 0; i < size.value; ++i) {
          const Vec<T> r = reciprocal<T>(queries[i] * key + T(1));
          const Vec<T> slope = r - r * r;
          dqueries[i] += dscores[i] * slope;
          dkey += dscores[i] * slope;
          to_v += dscores[i] * r;
        }
        store(dkeys + k * kLanes<T>, dkey);
      }
      for (int64_t k = 0; row.by_pair && k < row.count; ++k) {
        for (int i = 0; i < size.value; ++i) {
          if (!may_cancel(w.query_size[q + i], w.key_size[k])) continue;
          const T dscore = w.dscores[k * kQueryTile + q + i];
          const Vec<T> r = reciprocal<T>(queries[i] * load(keys + k * kLanes<T>) + T(1));
          const Vec<T> exact = exact_reciprocal(row.query(q + i) + a, row.key(k) + a, lanes);
          const Vec<T> change = dscore * ((exact - exact * exact) - (r - r * r));
          dqueries[i] += change;
          store(dkeys + k * kLanes<T>, load(dkeys + k * kLanes<T>) + change);
          to_v += dscore * (exact - r);
        }
      }
      if (p.dquery == nullptr) return;
      const Vec<T> factor = T(4) * load(w.v + a);
      for (int i = 0; i < size.value; ++i) {
        store_partial(p.dquery + (row.b * in.queries + row.q0 + q + i) * in.attn_dim + a, factor * dqueries[i], lanes);
      }
    });
    store(w.dv + a, load(w.dv + a) + to_v);
  }
}

// Gradients of the weights of a tile, for this thread's keys.
template <typename S, typename T = Compute<S>>
static inline void tile_dweights(const AdditiveAttentionBackwardParams<S>& p, const AdditiveRow<S>& row) {
  const AdditiveWorkspace<T>& w = row.w;
  for (int64_t k = row.own_keys.begin; k < row.own_keys.end; k += kRowBlock) {
    const S* values[kRowBlock];
    for (int j = 0; j < kRowBlock; ++j) values[j] = row.value(k + j);
    for_each_block<kQueryBlock>(row.queries, [&](int64_t q, auto size) {
      Vec<T> sums[kRowBlock][size.value] = {};
      pair_products<size.value>(w.grad + q * w.width, w.width, values, row.in.value_dim, sums);
      for (int j = 0; j < kRowBlock; ++j) {
        for (int i = 0; i < size.value; ++i) {
          w.dscores[(k + j) * kQueryTile + q + i] = sum_lanes<T>(sums[j][i]);
        }
      }
    });
    if (p.grad_weights == nullptr) continue;
    for (int64_t j = k; j < k + kRowBlock && j < row.count; ++j) {
      for (int64_t q = 0; q < row.queries; ++q) {
        w.dscores[j * kQueryTile + q] += read(p.grad_weights + row.pair(q, j));
      }
    }
  }
}

// The gradients of keys and values from the sums over all tiles; 0 for keys that are masked for all queries.
template <typename S, typename T = Compute<S>>
static inline void row_gradients(const AdditiveAttentionBackwardParams<S>& p, const AdditiveRow<S>& row, Range vectors,
                                 Range columns) {
  const AdditiveAttentionInput<S>& in = row.in;
  const AdditiveWorkspace<T>& w = row.w;
  int64_t k = 0;
  for (int64_t position = 0; position < in.keys; ++position) {
    const bool attended = k < row.count && w.attended[k] == position;
    const int64_t offset = row.b * in.keys + position;
    for (int64_t vector = vectors.begin; p.dkey != nullptr && vector < vectors.end; ++vector) {
      const int64_t a = vector * kLanes<T>;
      const int lanes = static_cast<int>(in.attn_dim - a < kLanes<T> ? in.attn_dim - a : kLanes<T>);
      const Vec<T> sum = attended ? T(4) * load(w.v + a) * load(w.dkeys + a * w.rows + k * kLanes<T>) : Vec<T>{};
      store_partial(p.dkey + offset * in.attn_dim + a, sum, lanes);
    }
    for_each_vector<T>(p.dvalues == nullptr ? 0 : columns.size(), [&](int64_t i, int lanes) {
      const int64_t d = columns.begin + i;
      store_partial(p.dvalues + offset * in.value_dim + d, attended ? load(w.dvalues + k * w.width + d) : Vec<T>{},
                    lanes);
    });
    k += attended;
  }
}

template <typename S>
static int64_t additive_backward_workspace(const AdditiveAttentionInput<S>& in, int threads) {
  return threads * AdditiveWorkspace<Compute<S>>(in, true).size();
}

template <typename S>
static void additive_backward(const AdditiveAttentionBackwardParams<S>& p, const ThreadTeam& team) {
  using T = Compute<S>;
  const AdditiveWorkspace<T> own(p.in, true, nullptr,
                                 p.workspace + AdditiveWorkspace<T>(p.in, true).size() * team.rank);
  zero(own.dv, own.vectors * kLanes<T>);
  for_each_row(p.in, true, p.workspace, team, [&](AdditiveRow<S>& row) {
    const AdditiveAttentionInput<S>& in = row.in;
    const AdditiveWorkspace<T>& w = row.w;
    const Range columns = row.team.slice(in.value_dim, kLanes<T>);
    const Range vectors = row.team.slice(w.vectors);
    for (int64_t a = vectors.begin; a < vectors.end; ++a) zero(w.dkeys + a * w.rows * kLanes<T>, w.rows * kLanes<T>);
    for (int64_t k = 0; k < row.count; ++k) zero(w.dvalues + k * w.width + columns.begin, columns.size());
    for (int64_t first = 0; first < in.queries; first += kQueryTile) {
      if (first > 0) row.team.sync();  // other threads may still read the previous tile's
      row.begin_tile(first, in.queries - first < kQueryTile ? in.queries - first : kQueryTile);
      const int64_t offset = row.b * in.queries + first;
      for (int64_t q = row.team.rank; q < row.queries; q += row.team.size) {
        T* grad = w.grad + q * w.width;
        zero(grad, w.width);
        if (p.grad_context != nullptr) convert(p.grad_context + (offset + q) * in.value_dim, grad, in.value_dim);
      }
      row.team.sync();
      row.score();
      tile_dweights(p, row);
      row.team.sync();
      if (row.team.rank == 0) tile_softmax_backward(row);
      row.team.sync();
      if (p.dvalues != nullptr) {
        for_each_block<kWideBlock>(row.count, [&](int64_t k, auto size) {
          for_each_vector<T>(columns.size(), [&](int64_t i, int) {
            const int64_t d = columns.begin + i;
            Vec<T> sums[size.value];
            for (int j = 0; j < size.value; ++j) sums[j] = load(w.dvalues + (k + j) * w.width + d);
            for (int64_t q = 0; q < row.queries; ++q) {
              const Vec<T> grad = load(w.grad + q * w.width + d);
#pragma GCC unroll 8
              for (int j = 0; j < size.value; ++j) sums[j] += w.scores[(k + j) * kQueryTile + q] * grad;
            }
            for (int j = 0; j < size.value; ++j) store(w.dvalues + (k + j) * w.width + d, sums[j]);
          });
        });
      }
      if (p.dquery != nullptr || p.dkey != nullptr || p.dv != nullptr) tile_gradients(p, row, vectors);
    }
    row_gradients(p, row, vectors, columns);
  });
  if (p.dv == nullptr) return;
  // The gradients of a row of scores sum to 0, so dv through tanh = 1 - 2 r is -2 times dv through r.
  team.sync();
  const T* first = own.dv - team.rank * own.size();
  const Range columns = team.slice(p.in.attn_dim, kLanes<T>);
  for_each_vector<T>(columns.size(), [&](int64_t i, int lanes) {
    const int64_t a = columns.begin + i;
    Vec<T> sum{};
    for (int rank = 0; rank < team.size; ++rank) sum += load(first + rank * own.size() + a);
    store_partial(p.dv + a, T(-2) * sum, lanes);
  });
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
