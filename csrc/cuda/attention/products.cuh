// Batched products of weights (or their gradients) with values (or their gradients).
#pragma once

#include "cuda/attention/pairs.cuh"
#include "cuda/device.cuh"

namespace llm_ext {
namespace cuda {
namespace {

// Results that several slabs add up.
template <typename S>
struct SlabSums {
  S* out;
  Compute<S>* so_far;  // sums of the previous slabs; null exactly if there is one slab
  int64_t batch;       // stride of both, in elements
  bool first, last;    // whether this is the first or last slab

  LLM_EXT_DEVICE void add(int64_t b, int64_t index_in_row, Compute<S> value) const {
    const int64_t index = b * batch + index_in_row;
    if (!first) value += so_far[index];
    if (last) {
      out[index] = narrow<S>(value);
    } else {
      so_far[index] = value;
    }
  }
};

template <typename S>
struct Matrix {
  const S* data;
  int64_t batch, row, column;  // strides in elements
};

// z [B, M, N] = x [B, M, K] y [B, K, N].
template <typename X, typename Y, typename Z>
struct ProductParams {
  Matrix<X> x;
  Matrix<Y> y;
  int64_t M, N, K;
  const int64_t* lengths;  // [B] rows of y from here on may hold any value and count as 0; null: all rows are valid
  const bool* seen;        // [B, K] rows of y that are false may hold any value and count as 0; null: all are valid
  SlabSums<Z> z;
  int64_t row_tiles, column_tiles;
};

constexpr int kProductColumns = 64, kProductDepth = 16;

// A thread has kM rows and 4 columns of a tile.
template <typename X, typename Y, typename Z, int kM>
LLM_EXT_SHARING_KERNEL(kThreads, 2)
void additive_product(LLM_EXT_PARAMS ProductParams<X, Y, Z> p) {
  using T = Compute<Z>;
  constexpr int kRows = 16 * kM, kRowStride = kRows + 4, kColumnStride = kProductColumns + 4;
  T* x_tile = reinterpret_cast<T*>(shared_memory());
  T* y_tile = x_tile + kProductDepth * kRowStride;
  const int64_t b = block_x() / (p.row_tiles * p.column_tiles), tile = block_x() % (p.row_tiles * p.column_tiles);
  const int64_t m0 = tile / p.column_tiles * kRows, n0 = tile % p.column_tiles * kProductColumns;
  const int m = thread_index() / 16 * kM, n = thread_index() % 16 * 4;
  T sums[kM][4] = {};
  for (int64_t k0 = 0; k0 < p.K; k0 += kProductDepth) {
    // Adjacent threads read adjacent elements.
    for (int i = thread_index(); i < kRows * kProductDepth; i += kThreads) {
      const int k = p.x.column == 1 ? i % kProductDepth : i / kRows,
                row = p.x.column == 1 ? i / kProductDepth : i % kRows;
      const bool there = m0 + row < p.M && k0 + k < p.K;
      x_tile[k * kRowStride + row] =
          there ? widen(p.x.data[b * p.x.batch + (m0 + row) * p.x.row + (k0 + k) * p.x.column]) : T(0);
    }
    for (int i = thread_index(); i < kProductColumns * kProductDepth; i += kThreads) {
      const int k = p.y.column == 1 ? i / kProductColumns : i % kProductDepth;
      const int column = p.y.column == 1 ? i % kProductColumns : i / kProductDepth;
      const bool there = n0 + column < p.N && k0 + k < p.K && (p.lengths == nullptr || k0 + k < p.lengths[b]) &&
                         (p.seen == nullptr || p.seen[b * p.K + k0 + k]);
      y_tile[k * kColumnStride + column] =
          there ? widen(p.y.data[b * p.y.batch + (k0 + k) * p.y.row + (n0 + column) * p.y.column]) : T(0);
    }
    block_barrier();
#pragma unroll
    for (int k = 0; k < kProductDepth; ++k) {
      T x[kM], y[4];
      read(x_tile + k * kRowStride + m, x);
      read(y_tile + k * kColumnStride + n, y);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += x[i] * y[j];
      }
    }
    block_barrier();
  }
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = m0 + m + i, column = n0 + n + j;
      if (row < p.M && column < p.N) p.z.add(b, row * p.N + column, sums[i][j]);
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace llm_ext
