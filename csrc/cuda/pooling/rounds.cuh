// Rounds: the thread groups of a batch row process adjacent chunks of time, one chunk each per round, and pass on what
// other chunks need through the workspace, with flags.
#pragma once

#include "cuda/device.cuh"
#include "cuda/pooling/launchers.h"

namespace llm_ext {
namespace cuda {

// The thread group of this thread.
struct RoundGroup {
  int threads;    // of the thread group
  int thread;     // this one, in its thread group
  int in_block;   // among the thread groups of the block
  int groups;     // of a batch row
  int64_t index;  // among the thread groups of all rows
  bool exists;
  int64_t b;      // batch row
  int64_t first;  // the index of the row's first thread group
  int rank;       // among those of the row

  LLM_EXT_DEVICE RoundGroup(const PoolPlan& plan, int64_t batch)
      : threads(plan.group_threads),
        thread(thread_index() & (plan.group_threads - 1)),
        in_block(thread_index() / plan.group_threads),
        groups(plan.round_groups),
        index(static_cast<int64_t>(block_x()) * (kPoolThreads / plan.group_threads) + in_block),
        exists(index < batch * plan.round_groups),
        b(exists ? index / plan.round_groups : 0),
        first(b * plan.round_groups),
        rank(static_cast<int>(index % plan.round_groups)) {}

  // Waits until all groups of the row have raised their flags for `rounds` rounds, then for the block.
  LLM_EXT_DEVICE void await_all(const uint32_t* flags, int rounds) const {
    for (int k = thread; exists && k < groups; k += threads) await_flag(flags + first + k, rounds);
    block_barrier();
  }
  LLM_EXT_DEVICE void raise(uint32_t* flags, int rounds) const {
    block_barrier();
    if (exists && thread == 0) raise_flag(flags + index, rounds);
  }
};

template <typename Params>
int launch_rounds(void (*kernel)(Params), const Params& params, const PoolPlan& plan, const RoundsLayout& layout,
                  int64_t batch, void* stream) {
  const int in_block = kPoolThreads / plan.group_threads;
  LaunchShape shape;
  shape.grid_x = (batch * plan.round_groups + in_block - 1) / in_block;
  shape.threads = kPoolThreads;
  shape.shared_bytes = static_cast<size_t>(layout.sums + in_block * layout.group);
  shape.all_resident = plan.round_groups > 1;
  return launch(kernel, shape, params, stream);
}

}  // namespace cuda
}  // namespace llm_ext
