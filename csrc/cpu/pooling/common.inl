// Attention pooling c = sum_t softmax_t(s) e_t: what all four kernels share. Pooling is bound by memory: each kernel
// reads e once, in tiles of rows that stay in the L1 cache. docs/math/attention.md derives the formulas.
//
// The team splits the batch; if the batch is smaller than the team, it splits time. Tensors are stored as S; sums,
// shares and the state are Compute<S>.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/vec.inl"
#include "cpu/simd/vec_math.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Rows of a tile: enough independent sums to cover the latency of a multiply-add, few enough for the registers. Zen 3:
// docs/lab/cpu-constants.md.
constexpr int kPoolTile = 8;

template <typename S>
static inline bool is_unmasked(const PoolInput<S>& in, int64_t b, int64_t t) {
  return (in.lengths == nullptr || t < in.lengths[b]) && (in.mask == nullptr || in.mask[b * in.steps + t]);
}

template <typename S>
static inline int64_t offset_of(const PoolInput<S>& in, int64_t b, int64_t t) {
  return b * in.e_batch_stride + t * in.e_step_stride;
}

template <typename A, typename B, typename T = Compute<A>>
static inline T dot(const A* a, const B* b, int64_t n) {
  Vec<T> sum{};
  for_each_vector<T>(n, [&](int64_t d, int lanes) { sum += load_partial(a + d, lanes) * load_partial(b + d, lanes); });
  return sum_lanes<T>(sum);
}

// Dot products of a tile of rows with v. Prefetches the first half of the rows `next`.
template <typename S, typename T = Compute<S>>
static inline void tile_dots(const S* const* rows, const S* const* next, const S* v, int64_t n, T* dots) {
  Vec<T> sums[kPoolTile] = {};
  for_each_vector<T>(n, [&](int64_t d, int lanes) {
    const Vec<T> value = load_partial(v + d, lanes);
#pragma GCC unroll 8
    for (int j = 0; j < kPoolTile; ++j) sums[j] += value * load_partial(rows[j] + d, lanes);
#pragma GCC unroll 8
    for (int j = 0; j < kPoolTile / 2; ++j) prefetch(next[j], d);
  });
  for (int j = 0; j < kPoolTile; ++j) dots[j] = sum_lanes<T>(sums[j]);
}

// `count` rows from t on, to prefetch. Positions beyond the sequence repeat its last row.
template <typename S>
static inline void next_rows(const PoolInput<S>& in, int64_t b, int64_t t, int count, const S** rows) {
  for (int j = 0; j < count; ++j) rows[j] = in.e + offset_of(in, b, t + j < in.steps ? t + j : in.steps - 1);
}

// Scores of `count` unmasked positions t, whose vectors are `rows`.
template <typename S, typename T = Compute<S>>
static inline void tile_scores(const PoolInput<S>& in, int64_t b, const int64_t* t, const S* const* rows,
                               const S* const* next, int count, T* scores) {
  if (in.u == nullptr) {
    for (int j = 0; j < count; ++j) scores[j] = read(in.scores + b * in.steps + t[j]);
  } else if (count == kPoolTile) {
    tile_dots(rows, next, in.u, in.dim, scores);
  } else {
    for (int j = 0; j < count; ++j) scores[j] = dot(rows[j], in.u, in.dim);
  }
}

template <typename T>
static inline LogSum<T> no_scores() {
  return {-infinity<T>(), T(0)};
}

// Adds the scores of `added` to those of *l. Of all of them, `added` has the share *share and *l had *keep.
template <typename T>
static inline void add_scores(LogSum<T>* l, LogSum<T> added, T* keep, T* share) {
  *keep = T(1);
  *share = T(0);
  if (added.max == -infinity<T>()) return;
  const T high = l->max > added.max ? l->max : added.max;
  const T old_sum = l->sum * scalar_exp(l->max - high);  // 0 from no scores
  const T new_sum = added.sum * scalar_exp(added.max - high);
  *l = {high, old_sum + new_sum};
  const T inverse = T(1) / l->sum;
  *keep = old_sum * inverse;
  *share = new_sum * inverse;
}

// A log-sum-exp as one number.
template <typename T>
static inline T log_sum_exp(LogSum<T> l) {
  return l.max == infinity<T>() || l.max == -infinity<T>() ? l.max : l.max + scalar_log(l.sum);
}

// Merges the pooled vector (l2, c2) into the state (l, c).
template <typename T>
static inline void merge(int64_t dim, LogSum<T>* l, T* c, LogSum<T> l2, const T* c2) {
  const bool empty = l->max == -infinity<T>();
  T keep, share;
  add_scores(l, l2, &keep, &share);
  if (share == T(0)) return;
  for_each_vector<T>(dim, [&](int64_t d, int lanes) {
    const Vec<T> old = load_partial(c + d, lanes);
    store_partial(c + d, empty ? load_partial(c2 + d, lanes) : old + share * (load_partial(c2 + d, lanes) - old),
                  lanes);
  });
}

// du = the sum of the threads' partial gradients, at partial + rank * stride, in order of rank.
template <typename S, typename T = Compute<S>>
static inline void reduce_du(int64_t dim, const T* partial, int64_t stride, S* du, const ThreadTeam& team) {
  team.sync();
  const Range columns = team.slice(dim, kLanes<T>);
  for_each_vector<T>(columns.size(), [&](int64_t i, int lanes) {
    const int64_t d = columns.begin + i;
    Vec<T> sum{};
    for (int rank = 0; rank < team.size; ++rank) sum += load_partial(partial + rank * stride + d, lanes);
    store_partial(du + d, sum, lanes);
  });
}

// Rows of workspace per thread in the backward pass: its partial du, and u and grad_c as T.
constexpr int kPoolGradRows = 3;

// The forward pass needs a row per thread, or per thread and batch row if the team splits time.
template <typename S>
static int64_t pool_workspace(const PoolInput<S>& in, int threads) {
  const int64_t rows = in.batch < threads && in.batch > kPoolGradRows ? in.batch : kPoolGradRows;
  return aligned(in.dim + 2) * threads * rows;
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
