// The causal prefix form of pooling: a_t = sigmoid(s_t - l), l <- logaddexp(l, s_t), c <- c + a_t (e_t - c),
// where l is a LogSum.
//
// The team splits the batch. If the batch does not divide evenly, it splits time, block by block: each thread runs its
// chunk of the block alone to get the chunk's summary; then every thread merges the summaries of the chunks before its
// own into the state and runs its chunk again for the results. The summary determines a chunk's effect on any state, so
// this is exact. docs/math/attention.md has the formulas.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/pooling/common.inl"
#include "cpu/ranges.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Elements of e in a thread's chunk of a block. A chunk is read twice, so it should stay in the cache. Zen 3:
// docs/lab/cpu-constants.md.
constexpr int64_t kChunkElements = 32768;

template <typename S>
static inline bool splits_time(const PoolInput<S>& in, int threads) {
  return in.batch % threads != 0 && in.batch < 4 * threads;
}

static inline int64_t chunk_steps(int64_t dim) {
  const int64_t steps = kChunkElements / (dim > 0 ? dim : 1) / kPoolTile * kPoolTile;
  return steps > kPoolTile ? steps : kPoolTile;
}

// Rows of workspace per thread: the state, the state of its chunk, du, zeros. Then two sets of a summary per thread, of
// two rows in the backward pass; the sets alternate, so that one barrier per block is enough. Each row has D + 2
// elements. Last, a number per position of a thread's chunk, for the backward pass.
constexpr int kPrefixRows = 4;

template <typename S>
static int64_t prefix_pool_workspace(const PoolInput<S>& in, int threads) {
  return threads * ((kPrefixRows + 4) * aligned(in.dim + 2) + aligned(chunk_steps(in.dim)));
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
