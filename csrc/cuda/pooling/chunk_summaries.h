// The pooled vectors of chunks. Plain C++.
#pragma once

#include "cuda/pooling/launchers.h"

namespace llm_ext {
namespace cuda {

template <typename S>
struct ChunkSummaries {
  PoolInput<S> in;
  PoolPlan plan;
  S* c;                    // [B, D] out, if a chunk is a whole row; null otherwise
  Compute<S>* partial_c;   // [chunks, D] out: the pooled vector of each chunk
  LogSum<Compute<S>>* l;   // [chunks] out: log-sum-exp
  Compute<S>* lse;         // [B] out: the same, if a chunk is a whole row; null otherwise
  Compute<S>* scores_out;  // [B, T] out; null: not wanted
};

// Queues the kernel and returns a cudaError_t. For S = float, double, BFloat16, Float16.
template <typename S>
int pool_chunks(const ChunkSummaries<S>& call, void* stream);

}  // namespace cuda
}  // namespace llm_ext
