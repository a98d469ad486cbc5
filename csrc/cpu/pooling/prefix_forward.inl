// The forward pass of prefix pooling.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/pooling/common.inl"
#include "cpu/pooling/prefix_common.inl"
#include "cpu/ranges.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/vec.inl"
#include "cpu/simd/vec_math.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// If a score exceeds all earlier ones by more than this, their share of the state could underflow.
constexpr double kSafeRise = 60.0;

// Scores of n <= kPoolTile positions from t on; -inf for masked positions.
template <typename S, typename T = Compute<S>>
static inline void prefix_scores(const PoolInput<S>& in, int64_t b, int64_t t, int n, T* scores) {
  int64_t steps[kPoolTile];
  const S* rows[kPoolTile];
  int count = 0;
  for (int j = 0; j < n; ++j) {
    if (!is_unmasked(in, b, t + j)) continue;
    steps[count] = t + j;
    rows[count++] = in.e + offset_of(in, b, t + j);
  }
  T found[kPoolTile];
  tile_scores(in, b, steps, rows, rows, count, found);
  for (int j = 0, next = 0; j < n; ++j) {
    scores[j] = next < count && steps[next] == t + j ? found[next++] : -infinity<T>();
  }
}

// The log-sum-exp that a caller has given. That of scores has a sum of at least 1; one that could underflow is replaced
// by a sum of 1.
template <typename T>
static inline LogSum<T> given_log_sum(LogSum<T> l) {
  if (l.sum >= T(1e-9)) return l;
  return l.sum == T(0) ? no_scores<T>() : LogSum<T>{l.max + scalar_log(l.sum), T(1)};
}

// From N scores and the state's l, which it updates: the share of each position, a, and of the state before it, 1 - a.
// Masked positions have a score of -inf.
template <typename T, int N>
static inline void prefix_shares(const T* scores, LogSum<T>* l, T* keep, T* share) {
  T max = l->max;
  for (int j = 0; j < N; ++j) max = scores[j] > max ? scores[j] : max;
  const T base = l->max > scores[0] ? l->max : scores[0];
  if (N > 1 && max - base < T(kSafeRise)) {
    // All exponentials at once, relative to the maximum of the tile.
    constexpr int kPadded = N > kLanes<T> ? N : kLanes<T>;
    T weights[kPadded] = {};
    for (int j = 0; j < N; ++j) weights[j] = scores[j];
    for (int j = 0; j < kPadded; j += kLanes<T>) store(weights + j, vec_exp<T>(load(weights + j) - max));
    T sum = l->sum * scalar_exp(l->max - max);
    for (int j = 0; j < N; ++j) {
      const T before = sum;
      sum += weights[j];
      const T inverse = T(1) / sum;
      keep[j] = before * inverse;
      share[j] = weights[j] * inverse;
    }
    *l = {max, sum};
    return;
  }
  for (int j = 0; j < N; ++j) add_scores(l, {scores[j], T(1)}, keep + j, share + j);
}

// Advances the state c over N unmasked rows of e, and stores it to N rows of c_rows unless that is null. Prefetches the
// rows `ahead` elements later unless that is 0.
template <typename S, int N, typename T = Compute<S>>
static inline void prefix_rows(const S* e, S* c_rows, int64_t stride, int64_t ahead, int64_t dim, const T* keep,
                               const T* share, T* c) {
  for_each_vector<T>(dim, [&](int64_t d, int lanes) {
    Vec<T> state = load_partial(c + d, lanes);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      // Written so that the dependency from row to row is one multiply-add.
      state = keep[j] * state + share[j] * load_partial(e + j * stride + d, lanes);
      if (c_rows != nullptr) store_partial(c_rows + j * stride + d, state, lanes);
      if (ahead != 0) prefetch(e + j * stride + ahead, d);
    }
    store_partial(c + d, state, lanes);
  });
}

// The passes over a range of positions: one pass, or a summary and then the results.
enum class Pass { kWhole, kSummary, kResults };

// Runs the positions `range` of batch row b from the state (l, c), which it updates. Between the two passes p.share
// holds scores. Prefetches the rows `ahead` steps later.
template <typename S, Pass pass, typename T = Compute<S>>
static void prefix_range(const PrefixPoolForwardParams<S>& p, int64_t b, Range range, int64_t ahead, LogSum<T>* l,
                         T* c) {
  const PoolInput<S>& in = p.in;
  const int64_t stride = in.e_step_stride;
  for (int64_t t = range.begin; t < range.end; t += kPoolTile) {
    const int n = static_cast<int>(range.end - t < kPoolTile ? range.end - t : kPoolTile);
    const S* e = in.e + offset_of(in, b, t);
    S* c_rows = pass == Pass::kSummary ? nullptr : p.c + offset_of(in, b, t);
    T* scores = p.share + b * in.steps + t;
    if (pass != Pass::kResults) prefix_scores(in, b, t, n, scores);
    bool whole = n == kPoolTile;
    for (int j = 0; j < n; ++j) whole = whole && scores[j] != -infinity<T>();
    T keep[kPoolTile], share[kPoolTile];
    if (whole) {
      prefix_shares<T, kPoolTile>(scores, l, keep, share);
      const int64_t next = t + ahead + kPoolTile <= in.steps ? ahead * stride : 0;
      prefix_rows<S, kPoolTile>(e, c_rows, stride, next, in.dim, keep, share, c);
    } else {
      for (int j = 0; j < n; ++j) {
        S* c_row = c_rows == nullptr ? nullptr : c_rows + j * stride;
        prefix_shares<T, 1>(scores + j, l, keep + j, share + j);
        if (scores[j] != -infinity<T>()) {
          prefix_rows<S, 1>(e + j * stride, c_row, 0, 0, in.dim, keep + j, share + j, c);
        } else if (c_row != nullptr) {
          convert(c, c_row, in.dim);
        }
      }
    }
    if (pass != Pass::kSummary) convert(share, scores, n);
  }
}

template <typename S, typename T = Compute<S>>
static void prefix_pool_forward(const PrefixPoolForwardParams<S>& p, const ThreadTeam& team) {
  const PoolInput<S>& in = p.in;
  const int64_t size = aligned(in.dim + 2);
  const bool split_time = splits_time(in, team.size);
  const Range batch = split_time ? Range{0, in.batch} : team.slice(in.batch);
  T* c = p.workspace + team.rank * kPrefixRows * size;
  T* chunk_c = c + size;
  T* sets = p.workspace + team.size * kPrefixRows * size;
  int turn = 0;
  for (int64_t b = batch.begin; b < batch.end; ++b) {
    LogSum<T> l = p.l0 == nullptr ? no_scores<T>() : given_log_sum(p.l0[b]);
    if (p.c0 == nullptr) {
      zero(c, in.dim);
    } else {
      convert(p.c0 + b * in.dim, c, in.dim);
    }
    if (!split_time) prefix_range<S, Pass::kWhole>(p, b, {0, in.steps}, kPoolTile, &l, c);
    const int64_t block = chunk_steps(in.dim) * team.size;
    for (int64_t start = 0; split_time && start < in.steps; start += block) {
      const Range slice = team.slice(in.steps - start < block ? in.steps - start : block, kPoolTile);
      const Range chunk = {start + slice.begin, start + slice.end};
      T* summaries = sets + turn * team.size * size;
      T* own = summaries + team.rank * size;
      zero(own, in.dim);
      LogSum<T> own_l = no_scores<T>();
      prefix_range<S, Pass::kSummary>(p, b, chunk, 0, &own_l, own);
      own[in.dim] = own_l.max;
      own[in.dim + 1] = own_l.sum;
      team.sync();
      LogSum<T> chunk_l = l;
      for (int rank = 0; rank < team.size; ++rank) {
        if (rank == team.rank) {
          chunk_l = l;
          convert(c, chunk_c, in.dim);
        }
        const T* summary = summaries + rank * size;
        merge(in.dim, &l, c, {summary[in.dim], summary[in.dim + 1]}, summary);
      }
      prefix_range<S, Pass::kResults>(p, b, chunk, block, &chunk_l, chunk_c);
      turn ^= 1;
    }
    if (!split_time || team.rank == 0) {
      p.l_n[b] = l;
      convert(c, p.c_n + b * in.dim, in.dim);
    }
  }
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
