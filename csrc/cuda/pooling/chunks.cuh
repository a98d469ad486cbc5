// The chunks of time that thread groups own, and launches with one thread group per chunk.
#pragma once

#include "cuda/device.cuh"
#include "cuda/pooling/columns.cuh"
#include "cuda/pooling/launchers.h"

namespace llm_ext {
namespace cuda {

struct Chunk {
  int64_t index;       // among the chunks of all rows
  int64_t b;           // batch row
  int64_t begin, end;  // positions; empty if the chunk does not exist
  bool exists;
};

// The chunk of this thread's group. `last_first` reverses the order: a kernel that reads what its predecessor has just
// read starts with the data that the L2 cache may still hold.
LLM_EXT_DEVICE Chunk chunk_of(const PoolPlan& plan, int64_t batch, int64_t steps, bool last_first) {
  const int64_t chunks = batch * plan.chunks;
  const int64_t group =
      static_cast<int64_t>(block_x()) * (kPoolThreads / plan.group_threads) + thread_index() / plan.group_threads;
  Chunk chunk = {};
  chunk.exists = group < chunks;
  if (!chunk.exists) return chunk;
  chunk.index = last_first ? chunks - 1 - group : group;
  chunk.b = chunk.index / plan.chunks;
  chunk.begin = chunk.index % plan.chunks * plan.chunk;
  chunk.end = chunk.begin + plan.chunk < steps ? chunk.begin + plan.chunk : steps;
  return chunk;
}

template <typename T, typename Params>
int launch_blocks(void (*kernel)(Params), const Params& params, int64_t blocks, void* stream,
                  size_t shared_bytes = kSharedBytes<T>) {
  if (blocks == 0) return 0;
  LaunchShape shape;
  shape.grid_x = blocks;
  shape.threads = kPoolThreads;
  shape.shared_bytes = shared_bytes;
  return launch(kernel, shape, params, stream);
}

template <typename T, typename Params>
int launch_chunks(void (*kernel)(Params), const Params& params, const PoolPlan& plan, int64_t batch, void* stream) {
  const int64_t groups = kPoolThreads / plan.group_threads;
  return launch_blocks<T>(kernel, params, (batch * plan.chunks + groups - 1) / groups, stream);
}

}  // namespace cuda
}  // namespace llm_ext
