// The backward pass of prefix pooling, a scan backwards in time.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/pooling/common.inl"
#include "cpu/pooling/prefix_common.inl"
#include "cpu/ranges.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Rows of a tile: each has two dot products in registers.
constexpr int kPrefixGradTile = 4;

// The gradient that later positions pass back: that of the state, and its dot product with the state.
template <typename T>
struct Carried {
  T* g;  // [D]
  T k;
};

// grad_c . c of N positions from t on, into `products`, first to last. Advances the state c over them: to recompute it
// from e, which is read anyway, is faster than to read its rows. With kSummary, adds the gradient that the positions
// pass back to `out`; *through is the product of 1 - a so far.
template <typename S, int N, bool kSummary, typename T = Compute<S>>
static inline void prefix_products_tile(const PrefixPoolBackwardParams<S>& p, int64_t b, int64_t t, T* c, T* products,
                                        Carried<T>* out, T* through, const S* zeros) {
  const PoolInput<S>& in = p.in;
  const int64_t stride = in.e_step_stride;
  const int64_t grad_stride = p.grad_c == nullptr ? 0 : stride;
  const S* grad_c = p.grad_c == nullptr ? zeros : p.grad_c + offset_of(in, b, t);
  const T* a = p.share + b * in.steps + t;
  const S* e = N == 1 && *a == T(0) ? zeros : in.e + offset_of(in, b, t);
  T keep[N], passed[N];
  for (int j = 0; j < N; ++j) {
    keep[j] = T(1) - a[j];
    *through *= keep[j];
    passed[j] = *through;
  }
  Vec<T> sums[N] = {};
  for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
    Vec<T> state = load_partial(c + d, lanes);
    Vec<T> passed_back{};
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const Vec<T> grad = load_partial(grad_c + j * grad_stride + d, lanes);
      state = keep[j] * state + a[j] * load_partial(e + j * stride + d, lanes);
      sums[j] += grad * state;
      if (kSummary) passed_back += passed[j] * grad;
    }
    store_partial(c + d, state, lanes);
    if (kSummary) store_partial(out->g + d, load_partial(out->g + d, lanes) + passed_back, lanes);
  });
  for (int j = 0; j < N; ++j) {
    products[j] = sum_lanes<T>(sums[j]);
    if (kSummary) out->k += passed[j] * products[j];
  }
}

// prefix_products_tile over the positions `range`. Returns the product of 1 - a: the factor of the gradient that passes
// through the range.
template <typename S, bool kSummary, typename T = Compute<S>>
static T prefix_products(const PrefixPoolBackwardParams<S>& p, int64_t b, Range range, T* c, T* products,
                         Carried<T>* out, const S* zeros) {
  const T* share = p.share + b * p.in.steps;
  T through = T(1);
  for (int64_t t = range.begin; t < range.end;) {
    bool whole = t + kPoolTile <= range.end;
    for (int j = 0; whole && j < kPoolTile; ++j) whole = share[t + j] != T(0);
    T* into = products + (t - range.begin);
    if (whole) {
      prefix_products_tile<S, kPoolTile, kSummary>(p, b, t, c, into, out, &through, zeros);
    } else {
      prefix_products_tile<S, 1, kSummary>(p, b, t, c, into, out, &through, zeros);
    }
    t += whole ? kPoolTile : 1;
  }
  return through;
}

// N positions of batch row b, the last of which is t: entry j is position t - j, products[-j] its grad_c . c. `carried`
// comes from the later positions, already multiplied by their 1 - a, and leaves for the earlier ones in the same form.
// Two scans: the first computes the dot products for the gradients of the scores, the second the results. Prefetches
// the rows `ahead` steps earlier.
template <typename S, int N, typename T = Compute<S>>
static inline void prefix_backward_tile(const PrefixPoolBackwardParams<S>& p, int64_t b, int64_t t, int64_t ahead,
                                        const T* products, Carried<T>* carried, T* du, const S* zeros) {
  const PoolInput<S>& in = p.in;
  const int64_t stride = in.e_step_stride;
  // Without grad_c every row of it is `zeros`. The e of a masked position is not read.
  const int64_t grad_stride = p.grad_c == nullptr ? 0 : stride;
  const S* grad_c = p.grad_c == nullptr ? zeros : p.grad_c + offset_of(in, b, t);
  const T* share = p.share + b * in.steps + t;
  const S* e = N == 1 && *share == T(0) ? zeros : in.e + offset_of(in, b, t);
  T* state_row = carried->g;
  const int64_t next = t - N + 1 - ahead >= 0 ? ahead * stride : 0;
  const int64_t next_grad = next == 0 || p.grad_c == nullptr ? 0 : next;
  T keep[N], a[N], ds[N];
  for (int j = 0; j < N; ++j) {
    a[j] = share[-j];
    keep[j] = T(1) - a[j];
  }

  Vec<T> with_e[N] = {};
  for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
    Vec<T> state = load_partial(state_row + d, lanes);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      state += load_partial(grad_c - j * grad_stride + d, lanes);
      with_e[j] += state * load_partial(e - j * stride + d, lanes);
      state *= keep[j];
      if (N > 1) prefetch(e - j * stride - next, d);
    }
  });
  for (int j = 0; j < N; ++j) {
    const T k = products[-j] + carried->k;
    ds[j] = a[j] == T(0) ? T(0) : a[j] * (sum_lanes<T>(with_e[j]) - k);
    carried->k = keep[j] * k;
  }

  if (p.dscores != nullptr) {
    for (int j = 0; j < N; ++j) convert(ds + j, p.dscores + b * in.steps + t - j, 1);
  }
  const S* u = in.u == nullptr ? zeros : in.u;
  S* de = p.de == nullptr ? nullptr : p.de + offset_of(in, b, t);
  for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
    Vec<T> state = load_partial(state_row + d, lanes);
    Vec<T> sum = load_partial(du + d, lanes);
    const Vec<T> score_vector = load_partial(u + d, lanes);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      state += load_partial(grad_c - j * grad_stride + d, lanes);
      sum += ds[j] * load_partial(e - j * stride + d, lanes);
      if (de != nullptr) store_partial(de - j * stride + d, a[j] * state + ds[j] * score_vector, lanes);
      state *= keep[j];
      if (N > 1) prefetch(grad_c - j * grad_stride - next_grad, d);
    }
    store_partial(state_row + d, state, lanes);
    store_partial(du + d, sum, lanes);
  });
}

// The positions `range` of batch row b, last to first; products[0] is that of the first.
template <typename S, typename T = Compute<S>>
static void prefix_backward_range(const PrefixPoolBackwardParams<S>& p, int64_t b, Range range, int64_t ahead,
                                  const T* products, Carried<T>* carried, T* du, const S* zeros) {
  const T* share = p.share + b * p.in.steps;
  for (int64_t t = range.end - 1; t >= range.begin;) {
    bool whole = t - kPrefixGradTile + 1 >= range.begin;
    for (int j = 0; whole && j < kPrefixGradTile; ++j) whole = share[t - j] != T(0);
    const T* product = products + (t - range.begin);
    if (whole) {
      prefix_backward_tile<S, kPrefixGradTile>(p, b, t, ahead, product, carried, du, zeros);
    } else {
      prefix_backward_tile<S, 1>(p, b, t, ahead, product, carried, du, zeros);
    }
    t -= whole ? kPrefixGradTile : 1;
  }
}

template <typename S, typename T = Compute<S>>
static void prefix_pool_backward(const PrefixPoolBackwardParams<S>& p, const ThreadTeam& team) {
  const PoolInput<S>& in = p.in;
  const int64_t size = aligned(in.dim + 2);
  const bool split_time = splits_time(in, team.size);
  const Range batch = split_time ? Range{0, in.batch} : team.slice(in.batch);
  T* state = p.workspace + team.rank * kPrefixRows * size;
  T* row = state + size;
  T* du = state + 2 * size;
  T* zeros = state + 3 * size;
  const S* no_row = reinterpret_cast<const S*>(zeros);
  T* sets = p.workspace + team.size * kPrefixRows * size;
  T* products = sets + 4 * team.size * size + team.rank * aligned(chunk_steps(in.dim));
  int turn = 0;
  zero(du, in.dim);
  zero(zeros, in.dim);
  for (int64_t b = batch.begin; b < batch.end; ++b) {
    const T* c0 = p.c0 == nullptr ? zeros : p.c0 + b * in.dim;
    const auto copy_c_before = [&](int64_t t, T* to) {
      t == 0 ? convert(c0, to, in.dim) : convert(p.c + offset_of(in, b, t - 1), to, in.dim);
    };
    Carried<T> carried = {state, p.grad_l_n == nullptr ? T(0) : -p.grad_l_n[b]};
    p.grad_c_n == nullptr ? zero(state, in.dim) : convert(p.grad_c_n + b * in.dim, state, in.dim);
    if (p.grad_c_n != nullptr && in.steps == 0) carried.k += dot(state, c0, in.dim);
    // `row` is the state after the products of a chunk. Subtracts the state that the products of the later positions
    // began with: a row of c, which may be rounded to 16 bits. After the last position there is none.
    const auto subtract_counted_state = [&](Range chunk) {
      if (chunk.begin == chunk.end) return zero(row, in.dim);
      if (chunk.end == in.steps) return;
      const S* counted = p.c + offset_of(in, b, chunk.end - 1);
      for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
        store_partial(row + d, load_partial(row + d, lanes) - load_partial(counted + d, lanes), lanes);
      });
    };
    const int64_t block = chunk_steps(in.dim) * (split_time ? team.size : 1);
    for (int64_t end = in.steps; end > 0; end -= block) {
      const int64_t count = end < block ? end : block;
      const Range slice = split_time ? team.slice(count, kPoolTile) : Range{0, count};
      const Range chunk = {end - count + slice.begin, end - count + slice.end};
      copy_c_before(chunk.begin, row);
      if (!split_time) {
        prefix_products<S, false, T>(p, b, chunk, row, products, nullptr, no_row);
        subtract_counted_state(chunk);
        carried.k += dot(state, row, in.dim);
        prefix_backward_range(p, b, chunk, block, products, &carried, du, no_row);
        continue;
      }
      T* summaries = sets + turn * team.size * 2 * size;
      T* own = summaries + team.rank * 2 * size;
      zero(own, in.dim);
      Carried<T> out = {own, T(0)};
      own[in.dim] = prefix_products<S, true>(p, b, chunk, row, products, &out, no_row);
      own[in.dim + 1] = out.k;
      subtract_counted_state(chunk);
      convert(row, own + size, in.dim);
      team.sync();
      Carried<T> into = {row, T(0)};
      for (int rank = team.size - 1; rank >= 0; --rank) {
        const T* summary = summaries + rank * 2 * size;
        carried.k += dot(state, summary + size, in.dim);
        if (rank == team.rank) {
          convert(state, into.g, in.dim);
          into.k = carried.k;
        }
        const T through = summary[in.dim];
        for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
          store_partial(state + d, load_partial(summary + d, lanes) + through * load_partial(state + d, lanes), lanes);
        });
        carried.k = summary[in.dim + 1] + through * carried.k;
      }
      prefix_backward_range(p, b, chunk, block, products, &into, du, no_row);
      turn ^= 1;
    }
    if (!split_time || team.rank == 0) {
      if (p.dl0 != nullptr) p.dl0[b] = dot(state, c0, in.dim) - carried.k;
      if (p.dc0 != nullptr) convert(state, p.dc0 + b * in.dim, in.dim);
    }
  }
  if (p.du != nullptr) reduce_du(in.dim, p.workspace + 2 * size, kPrefixRows * size, p.du, team);
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
