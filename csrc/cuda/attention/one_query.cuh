// Kernels for one query in each row of the batch, as in a decoder.
//
// Each key has one pair, so tiles in shared memory would gain nothing: a lane loads packs of 16 bytes of kRowsAtOnce
// keys (or values) and adds in registers. Each kernel reads, or writes, keys or values once, the gradients of the keys
// both. A warp has 2 KB in flight, a multiprocessor 16 warps or more. A number of a key takes an exponential and a
// reciprocal, and about 13 instructions in scores and 20 in gradients. On an H200 a multiprocessor does 8 numbers a
// clock by the special functions and 10 or 6 by the instructions, and memory gives it 9 of 2 bytes, or 4.5 to read and
// write.
#pragma once

#include "cuda/attention/pairs.cuh"
#include "cuda/attention/softmax.cuh"
#include "cuda/device.cuh"

namespace llm_ext {
namespace cuda {
namespace {

constexpr int kRowsAtOnce = 4;

template <typename S>
struct OneQueryParams {
  Rows<S> rows;          // keys or values
  int64_t batch, width;  // width: A or Dv
  int64_t tiles;         // in a row of the batch: of kRowsAtOnce rows, or of a pack of columns for each lane
  const S* x;            // [B, width] query, or gradient of the context (null: zeros)
  const S* v;            // [A]
  Compute<S>* numbers;   // [B, Tk] scores, weights, or gradients of these
  S* out;                // [B, width] out: the context, or the gradient of the query; null: not wanted
  S* d_rows;             // [B, Tk, width] out: gradients of keys or values; null: not wanted
  Compute<S>* dv;        // [B, A] out: partial sums; null: not wanted
};

// Writes the pack of a row of A numbers from `a` on, without what is beyond the end.
template <typename S>
LLM_EXT_DEVICE void store_pack(const LanePack<S>& pack, S* row, int64_t a, int64_t A) {
  if (A % kPackSize<S> == 0 && a < A) {
    pack.store(row + a);
  } else {
#pragma unroll
    for (int n = 0; n < kPackSize<S>; ++n) {
      if (a + n < A) row[a + n] = pack.get(n);
    }
  }
}

// kRowsAtOnce rows of b: `first`, `first` + `step`, ...
template <typename S>
struct SomeRows {
  const OneQueryParams<S>& p;
  int64_t b, first;
  int step;
  bool valid[kRowsAtOnce];  // others count as 0

  LLM_EXT_DEVICE SomeRows(const OneQueryParams<S>& p, int64_t b, int64_t first, int step)
      : p(p), b(b), first(first), step(step) {
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) valid[i] = p.rows.has(b, first + i * step);
  }
  LLM_EXT_DEVICE bool exists(int i) const { return first + i * step < p.rows.count; }
  LLM_EXT_DEVICE int64_t index(int i) const { return b * p.rows.count + first + i * step; }

  LLM_EXT_DEVICE void load(int64_t a, LanePack<S> (&packs)[kRowsAtOnce]) const {
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (valid[i]) load_pack(packs[i], p.rows.data + index(i) * p.width, a, p.width);
    }
  }
  LLM_EXT_DEVICE void load_numbers(Compute<S> (&numbers)[kRowsAtOnce]) const {
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) numbers[i] = exists(i) ? p.numbers[index(i)] : Compute<S>(0);
  }
};

// Scores, or the products of the gradient of the context with each value. A warp has kRowsAtOnce rows.
template <typename S, bool kScores>
LLM_EXT_SHARING_KERNEL(kThreads, 2)
void one_query_dots(LLM_EXT_PARAMS OneQueryParams<S> p) {
  using T = Compute<S>;
  const int64_t warp = static_cast<int64_t>(block_x()) * kWarps + warp_index(), b = warp / p.tiles;
  if (b >= p.batch) return;
  const SomeRows<S> rows(p, b, warp % p.tiles * kRowsAtOnce, 1);
  T sums[kRowsAtOnce] = {}, v_sum = T(0);
  for (int64_t a = lane_index() * kPackSize<S>; a < p.width; a += kWarpThreads * kPackSize<S>) {
    LanePack<S> y[kRowsAtOnce], x, v;
    rows.load(a, y);
    load_pack(x, p.x + b * p.width, a, p.width);
    if (kScores) load_pack(v, p.v, a, p.width);
#pragma unroll
    for (int n = 0; n < kPackSize<S>; ++n) {
      v_sum += v[n];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) sums[i] += kScores ? v[n] * exact_r(x[n] + y[i][n]) : x[n] * y[i][n];
    }
  }
#pragma unroll
  for (int i = 0; i < kRowsAtOnce; ++i) {
    const T sum = warp_sum(kScores ? v_sum - 2 * sums[i] : sums[i]), masked = kScores ? kMinusInfinity<T> : T(0);
    if (lane_index() == i && rows.exists(i)) p.numbers[rows.index(i)] = rows.valid[i] ? sum : masked;
  }
}

// Gradients of the values, weight times gradient of the context. A warp has kRowsAtOnce rows.
template <typename S>
LLM_EXT_SHARING_KERNEL(kThreads, 2)
void one_query_value_gradients(LLM_EXT_PARAMS OneQueryParams<S> p) {
  using T = Compute<S>;
  const int64_t warp = static_cast<int64_t>(block_x()) * kWarps + warp_index(), b = warp / p.tiles;
  if (b >= p.batch) return;
  const SomeRows<S> rows(p, b, warp % p.tiles * kRowsAtOnce, 1);
  T weights[kRowsAtOnce];
  rows.load_numbers(weights);
  for (int64_t a = lane_index() * kPackSize<S>; a < p.width; a += kWarpThreads * kPackSize<S>) {
    LanePack<S> x;
    if (p.x != nullptr) load_pack(x, p.x + b * p.width, a, p.width);
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      LanePack<S> d;
#pragma unroll
      for (int n = 0; n < kPackSize<S>; ++n) d.set(n, narrow<S>(weights[i] * x[n]));
      if (rows.exists(i)) store_pack(d, p.d_rows + rows.index(i) * p.width, a, p.width);
    }
  }
}

// The sums over the warps of the block, in order, for its first warp.
template <typename T, int n>
LLM_EXT_DEVICE void add_warps(T (&sums)[n]) {
  T* shared = reinterpret_cast<T*>(shared_memory()) + lane_index();
#pragma unroll
  for (int i = 0; i < n; ++i) shared[(warp_index() * n + i) * kWarpThreads] = sums[i];
  block_barrier();
  if (warp_index() > 0) return;
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sums[i] += shared[(w * n + i) * kWarpThreads];
  }
}

// The context. A lane has a pack of columns, a warp every eighth row: enough threads even for a small batch.
template <typename S>
LLM_EXT_SHARING_KERNEL(kThreads, 2)
void one_query_context(LLM_EXT_PARAMS OneQueryParams<S> p) {
  using T = Compute<S>;
  const int64_t b = block_x() / p.tiles, a = (block_x() % p.tiles * kWarpThreads + lane_index()) * kPackSize<S>;
  T sums[kPackSize<S>] = {};
  for (int64_t k = warp_index(); k < p.rows.count; k += kRowsAtOnce * kWarps) {
    const SomeRows<S> rows(p, b, k, kWarps);
    LanePack<S> y[kRowsAtOnce];
    T weights[kRowsAtOnce];
    rows.load(a, y);
    rows.load_numbers(weights);
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
#pragma unroll
      for (int n = 0; n < kPackSize<S>; ++n) sums[n] += weights[i] * y[i][n];
    }
  }
  add_warps(sums);
  if (warp_index() > 0) return;
  LanePack<S> context;
#pragma unroll
  for (int n = 0; n < kPackSize<S>; ++n) context.set(n, narrow<S>(sums[n]));
  store_pack(context, p.out + b * p.width, a, p.width);
}

// Gradients of the query, the keys and v: with one query, each term of the query's is the gradient of a key. Threads
// as for the context.
template <typename S>
LLM_EXT_SHARING_KERNEL(kThreads, 2)
void one_query_gradients(LLM_EXT_PARAMS OneQueryParams<S> p) {
  using T = Compute<S>;
  constexpr int kEach = kPackSize<S>;
  const int64_t b = block_x() / p.tiles, a = (block_x() % p.tiles * kWarpThreads + lane_index()) * kEach;
  LanePack<S> x, v;
  load_pack(x, p.x + b * p.width, a, p.width);
  load_pack(v, p.v, a, p.width);
  T sums[2 * kEach] = {};  // ds r (1 - r), then ds r
  T d_all = T(0);
  for (int64_t k = warp_index(); k < p.rows.count; k += kRowsAtOnce * kWarps) {
    const SomeRows<S> rows(p, b, k, kWarps);
    LanePack<S> y[kRowsAtOnce];
    T ds[kRowsAtOnce];
    rows.load(a, y);
    rows.load_numbers(ds);
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (!rows.exists(i)) continue;
      d_all += ds[i];
      LanePack<S> d;
#pragma unroll
      for (int n = 0; n < kEach; ++n) {
        const T r = exact_r(x[n] + y[i][n]), product = ds[i] * (r - r * r);
        sums[n] += product;
        sums[kEach + n] += ds[i] * r;
        d.set(n, narrow<S>(4 * v[n] * product));
      }
      if (p.d_rows != nullptr) store_pack(d, p.d_rows + rows.index(i) * p.width, a, p.width);
    }
  }
#pragma unroll
  for (int n = 0; n < kEach; ++n) sums[kEach + n] = d_all - 2 * sums[kEach + n];
  add_warps(sums);
  if (warp_index() > 0) return;
  LanePack<S> d;
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    d.set(n, narrow<S>(4 * v[n] * sums[n]));
    if (p.dv != nullptr && a + n < p.width) p.dv[b * p.width + a + n] = sums[kEach + n];
  }
  if (p.out != nullptr) store_pack(d, p.out + b * p.width, a, p.width);
}

}  // namespace
}  // namespace cuda
}  // namespace llm_ext
