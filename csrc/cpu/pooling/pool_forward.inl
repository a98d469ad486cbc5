// The forward pass of pooling.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/pooling/common.inl"
#include "cpu/ranges.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/vec.inl"
#include "cpu/simd/vec_math.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Pools the positions `range` of batch row b into c [D] by online softmax. Returns the log-sum-exp; c is 0 if all are
// masked.
template <typename S, typename T = Compute<S>>
static LogSum<T> pool_range(const PoolInput<S>& in, int64_t b, Range range, T* c) {
  if (in.dim == 0 && in.u != nullptr && in.mask == nullptr) {  // scores of 0 at positions that take no memory
    const int64_t count = intersect(range, {0, in.lengths == nullptr ? in.steps : in.lengths[b]}).size();
    return count > 0 ? LogSum<T>{T(0), static_cast<T>(count)} : no_scores<T>();
  }
  T max = -infinity<T>();
  T sum = T(0);
  for_each_vector<T>(in.dim, [&](int64_t d, int lanes) { store_partial(c + d, Vec<T>{}, lanes); });
  int64_t t = range.begin;
  while (t < range.end) {
    int64_t steps[kPoolTile];
    const S* rows[kPoolTile];
    int count = 0;
    for (; t < range.end && count < kPoolTile; ++t) {
      if (!is_unmasked(in, b, t)) continue;
      steps[count] = t;
      rows[count++] = in.e + offset_of(in, b, t);
    }
    if (count == 0) break;
    constexpr int kPadded = kPoolTile > kLanes<T> ? kPoolTile : kLanes<T>;
    T weights[kPadded] = {};
    const S* next[kPoolTile];
    next_rows(in, b, t, kPoolTile, next);
    tile_scores(in, b, steps, rows, next, count, weights);
    T tile_max = max;
    for (int j = 0; j < count; ++j)
      tile_max = weights[j] > tile_max || weights[j] != weights[j] ? weights[j] : tile_max;
    if (tile_max == -infinity<T>()) continue;
    const T rescale = max == -infinity<T>() ? T(0) : scalar_exp(max - tile_max);
    max = tile_max;
    for (int j = 0; j < kPadded; j += kLanes<T>) store(weights + j, vec_exp<T>(load(weights + j) - max));
    sum *= rescale;
    for (int j = 0; j < count; ++j) sum += weights[j];
    if (count == kPoolTile) {
      for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
        Vec<T> value = load_partial(c + d, lanes) * rescale;
#pragma GCC unroll 8
        for (int j = 0; j < kPoolTile; ++j) value += weights[j] * load_partial(rows[j] + d, lanes);
        store_partial(c + d, value, lanes);
#pragma GCC unroll 8
        for (int j = kPoolTile / 2; j < kPoolTile; ++j) prefetch(next[j], d);
      });
    } else {
      for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
        Vec<T> value = load_partial(c + d, lanes) * rescale;
        for (int j = 0; j < count; ++j) value += weights[j] * load_partial(rows[j] + d, lanes);
        store_partial(c + d, value, lanes);
      });
    }
  }
  if (max == -infinity<T>()) return no_scores<T>();
  const T scale = T(1) / sum;
  for_each_vector<T>(in.dim,
                     [&](int64_t d, int lanes) { store_partial(c + d, load_partial(c + d, lanes) * scale, lanes); });
  return {max, sum};
}

template <typename S, typename T = Compute<S>>
static void pool_forward(const PoolForwardParams<S>& p, const ThreadTeam& team) {
  const PoolInput<S>& in = p.in;
  const int64_t size = aligned(in.dim + 2);
  if (in.batch >= team.size) {
    const Range batch = team.slice(in.batch);
    T* c = p.workspace + team.rank * size;
    for (int64_t b = batch.begin; b < batch.end; ++b) {
      p.l[b] = pool_range(in, b, {0, in.steps}, c);
      p.lse[b] = log_sum_exp(p.l[b]);
      convert(c, p.c + b * in.dim, in.dim);
    }
    return;
  }
  const Range steps = team.slice(in.steps, kPoolTile);
  for (int64_t b = 0; b < in.batch; ++b) {
    T* partial = p.workspace + (b * team.size + team.rank) * size;
    const LogSum<T> l = pool_range(in, b, steps, partial);
    partial[in.dim] = l.max;
    partial[in.dim + 1] = l.sum;
  }
  team.sync();
  if (team.rank != 0) return;
  for (int64_t b = 0; b < in.batch; ++b) {
    T* c = p.workspace + b * team.size * size;
    p.l[b] = {c[in.dim], c[in.dim + 1]};
    for (int rank = 1; rank < team.size; ++rank) {
      const T* partial = c + rank * size;
      merge(in.dim, p.l + b, c, {partial[in.dim], partial[in.dim + 1]}, partial);
    }
    p.lse[b] = log_sum_exp(p.l[b]);
    convert(c, p.c + b * in.dim, in.dim);
  }
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
