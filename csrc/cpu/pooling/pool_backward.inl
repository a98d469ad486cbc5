// The backward pass of pooling.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/pooling/common.inl"
#include "cpu/ranges.inl"
#include "cpu/simd/float16.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/vec.inl"
#include "cpu/simd/vec_math.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Rows of a tile in the backward pass, which has two sums per row.
constexpr int kPoolGradTile = 4;

// Arguments and sums of one batch row, as T; missing gradients are zeros.
template <typename T>
struct PoolGrad {
  T max, inverse;  // alpha = exp(s - max) * inverse
  T g_lse;
  T g_c;       // g . c
  const T* g;  // [D] gradient of c
  const T* u;  // [D]
  T* du;       // [D], accumulated
  T excess;    // accumulated sum of alpha (g . e - g . c): over all positions 0, except for the rounding of c
};

// N unmasked positions t of batch row b, whose vectors are `rows`. Prefetches the rows `next`.
template <typename S, int N, typename T = Compute<S>>
static inline void pool_backward_tile(const PoolBackwardParams<S>& p, int64_t b, const int64_t* t, const S* const* rows,
                                      const S* const* next, PoolGrad<T>* grad) {
  const PoolInput<S>& in = p.in;
  const T* u_row = grad->u;
  const T* g_row = grad->g;
  T* du = grad->du;
  Vec<T> with_u[N] = {}, with_g[N] = {};
  for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
    const Vec<T> u = load_partial(u_row + d, lanes), g = load_partial(g_row + d, lanes);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const Vec<T> e = load_partial(rows[j] + d, lanes);
      with_u[j] += e * u;
      with_g[j] += e * g;
      prefetch(next[j], d);
    }
  });
  constexpr int kPadded = N > kLanes<T> ? N : kLanes<T>;
  T alpha[kPadded] = {}, ds[N];
  for (int j = 0; j < N; ++j) {
    alpha[j] = (in.u == nullptr ? read(in.scores + b * in.steps + t[j]) : sum_lanes<T>(with_u[j])) - grad->max;
  }
  for (int j = 0; j < kPadded; j += kLanes<T>) store(alpha + j, vec_exp<T>(load(alpha + j)) * grad->inverse);
  for (int j = 0; j < N; ++j) {
    const T slope = alpha[j] * (sum_lanes<T>(with_g[j]) - grad->g_c);
    grad->excess += slope;
    ds[j] = slope + alpha[j] * grad->g_lse;
    if (p.dscores != nullptr) convert(ds + j, p.dscores + b * in.steps + t[j], 1);
  }
  if (p.du != nullptr) {
    for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
      Vec<T> sum = load_partial(du + d, lanes);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum += ds[j] * load_partial(rows[j] + d, lanes);
      store_partial(du + d, sum, lanes);
    });
  }
  // Row by row: alternating stores to several rows are slower.
  for (int j = 0; j < N && p.de != nullptr; ++j) {
    S* de = p.de + offset_of(in, b, t[j]);
    const T a = alpha[j], slope = ds[j];
    for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
      store_partial(de + d, a * load_partial(g_row + d, lanes) + slope * load_partial(u_row + d, lanes), lanes);
    });
  }
}

template <typename S, typename T = Compute<S>>
static void pool_backward_range(const PoolBackwardParams<S>& p, int64_t b, Range range, PoolGrad<T>* grad) {
  const PoolInput<S>& in = p.in;
  for (int64_t t = range.begin; t < range.end;) {
    int64_t steps[kPoolGradTile];
    const S* rows[kPoolGradTile];
    int count = 0;
    for (; t < range.end && count < kPoolGradTile; ++t) {
      if (is_unmasked(in, b, t) && grad->max != -infinity<T>()) {
        steps[count] = t;
        rows[count++] = in.e + offset_of(in, b, t);
        continue;
      }
      if (p.de != nullptr) zero(p.de + offset_of(in, b, t), in.dim);
      if (p.dscores != nullptr) zero(p.dscores + b * in.steps + t, 1);
    }
    const S* next[kPoolGradTile];
    next_rows(in, b, t + kPoolGradTile, kPoolGradTile, next);
    if (count == kPoolGradTile) {
      pool_backward_tile<S, kPoolGradTile>(p, b, steps, rows, next, grad);
    } else {
      for (int j = 0; j < count; ++j) pool_backward_tile<S, 1>(p, b, steps + j, rows + j, next, grad);
    }
  }
}

template <typename S, typename T = Compute<S>>
static void pool_backward(const PoolBackwardParams<S>& p, const ThreadTeam& team) {
  const PoolInput<S>& in = p.in;
  const int64_t size = aligned(in.dim + 2);
  T* du = p.workspace + team.rank * kPoolGradRows * size;
  T* u = du + size;
  T* g = du + 2 * size;
  zero(du, in.dim);
  in.u == nullptr ? zero(u, in.dim) : convert(in.u, u, in.dim);
  const bool split_batch = in.batch >= team.size;
  const Range batch = split_batch ? team.slice(in.batch) : Range{0, in.batch};
  const Range steps = split_batch ? Range{0, in.steps} : team.slice(in.steps, kPoolTile);
  for (int64_t b = batch.begin; b < batch.end; ++b) {
    const S* c = p.c + b * in.dim;
    p.grad_c == nullptr ? zero(g, in.dim) : convert(p.grad_c + b * in.dim, g, in.dim);
    const T g_lse = p.grad_lse == nullptr ? T(0) : p.grad_lse[b];
    PoolGrad<T> grad = {p.l[b].max, T(1) / p.l[b].sum, g_lse, dot(g, c, in.dim), g, u, du, T(0)};
    pool_backward_range(p, b, steps, &grad);
    if constexpr (kIsNarrow<S>) {
      // c is rounded, so g . c has the same error in every ds, and du would have that error times c. Subtract it.
      for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
        store_partial(du + d, load_partial(du + d, lanes) - grad.excess * load_partial(c + d, lanes), lanes);
      });
    }
  }
  if (p.du != nullptr) reduce_du(in.dim, p.workspace, kPoolGradRows * size, p.du, team);
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
