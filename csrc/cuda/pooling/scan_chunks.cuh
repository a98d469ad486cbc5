// A scan over the chunks of a batch row: x = keep_i x + share_i y_i for each column.
//
// A block owns 32 columns, a lane each, and its warps own ranges of chunks. Each warp goes through its range from zero,
// which gives its effect on any state; then the state before each range follows, and each warp goes through its range
// again.
#pragma once

#include "cuda/device.cuh"
#include "cuda/pooling/columns.cuh"
#include "cuda/pooling/launchers.h"

namespace llm_ext {
namespace cuda {

// Shared memory of a block: that of sums over threads, and the effect of each range on each column.
template <typename T>
constexpr size_t kScanBytes = kSharedBytes<T> + kPoolWarps * (kWarpThreads + 1) * sizeof(T);

// The chunks of this warp, of `count`.
struct ChunkRange {
  int64_t begin, end;

  LLM_EXT_DEVICE explicit ChunkRange(int64_t count) {
    const int64_t each = (count + kPoolWarps - 1) / kPoolWarps;
    begin = warp_index() * each < count ? warp_index() * each : count;
    end = begin + each < count ? begin + each : count;
  }
};

template <typename T>
struct Factors {
  T keep = T(1), share = T(0);
};

// Calls put(i, x, y_i) with x before chunk i, for all i of the warp's range, and returns x after the last chunk.
// factors_of(first) gives a lane the factors of chunk first + lane; it is called for all chunks of the range in order,
// twice. load(i) gives y_i, a number or a struct that converts to it.
template <typename T, typename FactorsOf, typename Load, typename Put>
LLM_EXT_DEVICE T scan_chunks(int64_t count, T start, const FactorsOf& factors_of, const Load& load, const Put& put) {
  constexpr int kAhead = 8;
  T* effects = reinterpret_cast<T*>(shared_memory() + kSharedBytes<T>);
  T* kept = effects + kPoolWarps * kWarpThreads;
  const ChunkRange range(count);
  const auto pass = [&](T x, T& product, const auto& put) {
    for (int64_t first = range.begin; first < range.end; first += kWarpThreads) {
      const Factors<T> own = factors_of(first);
      for (int j0 = 0; j0 < kWarpThreads && first + j0 < range.end; j0 += kAhead) {
        decltype(load(first)) y[kAhead] = {};
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (first + j0 + j < range.end) y[j] = load(first + j0 + j);
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const T keep = shuffle(own.keep, j0 + j), share = shuffle(own.share, j0 + j);
          if (first + j0 + j >= range.end) continue;
          put(first + j0 + j, x, y[j]);
          x = keep * x + share * static_cast<T>(y[j]);
          product *= keep;
        }
      }
    }
    return x;
  };
  T product = T(1);
  effects[thread_index()] = pass(T(0), product, [](int64_t, T, const auto&) {});
  if (lane_index() == 0) kept[warp_index()] = product;
  block_barrier();
  T before = start, x = start;
  for (int w = 0; w < kPoolWarps; ++w) {
    if (w == warp_index()) before = x;
    x = kept[w] * x + effects[w * kWarpThreads + lane_index()];
  }
  block_barrier();  // the memory may be used again
  pass(before, product, put);
  return x;
}

}  // namespace cuda
}  // namespace llm_ext
