// The contracts of attention pooling's launchers on NVIDIA GPUs. Plain C++: no CUDA header is needed.
//
// Launchers take the params of params/pooling.h and queue all work of an op on a stream without waiting. Lengths and
// masks are read by kernels alone; lengths out of range are clamped. Launchers return a cudaError_t (0: queued) and
// clear CUDA's last error. Pointers are to memory of the current device; tensors and workspace are aligned to 16 bytes.
// The same input, plan and device give the same bits. All exist for S = float, double, BFloat16, Float16.
#pragma once

#include <cstdint>

#include "cuda/device_facts.h"
#include "params/pooling.h"

namespace llm_ext {
namespace cuda {

constexpr int kPoolThreads = 256;  // per block

// The partition of a call. A thread group owns a chunk of time of one batch row; its threads own columns.
struct PoolPlan {
  int packs = 0;  // 16-byte packs of a row that a thread holds in registers: 1, 2 or 4; 0: any D, one number at a
                  // time
  int group_threads = 0;  // threads per thread group, a power of two
  int64_t chunk = 0;      // positions per chunk
  int64_t chunks = 1;     // per batch row
  int round_groups = 0;   // thread groups per batch row, all resident, which take a chunk each per round; 0: no rounds

  // Whether a thread group processes a whole row with its sums in registers: then nothing is left to reduce.
  bool whole() const { return chunks == 1 && packs > 0; }
};

// As many thread groups as the device has room for, with chunks that are long compared to their summary.
PoolPlan make_pool_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes, int sm_count);
// The forward pass of the prefix form: rounds if rows are few and long enough, otherwise make_pool_plan().
PoolPlan make_prefix_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes, const DeviceFacts& facts);

// Shared memory of a block that runs rounds, in bytes.
constexpr int kRoundSlots = 3;  // chunks of a thread group in shared memory
struct RoundsLayout {
  int sums;   // per block, for sums over threads; the thread groups follow
  int rows;   // per thread group: the rows of its chunks
  int group;  // per thread group: rows and scores
};
constexpr RoundsLayout rounds_layout(const PoolPlan& plan, int64_t dim, int element_bytes, int computed_bytes) {
  const int positions = kRoundSlots * static_cast<int>(plan.chunk);
  const int rows = positions * static_cast<int>(dim) * element_bytes;
  return {2 * 8 * 8 * computed_bytes, rows, (rows + positions * computed_bytes + 15) / 16 * 16};
}

// Elements of pooled rows in a workspace. A LogSum, whose two numbers may be accessed at once, follows: hence even.
inline int64_t pooled_rows_size(int64_t rows, int64_t dim) { return (rows * dim + 1) / 2 * 2; }

// Workspace of a call, in elements of Compute<S>.
int64_t pool_forward_workspace(int64_t batch, int64_t dim, const PoolPlan& plan);
int64_t pool_backward_workspace(int64_t batch, int64_t dim, const PoolPlan& plan);
int64_t prefix_pool_forward_workspace(int64_t batch, int64_t steps, int64_t dim, const PoolPlan& plan);
int64_t prefix_pool_backward_workspace(int64_t batch, int64_t steps, int64_t dim, const PoolPlan& plan);

// B, T and D may be 0.
template <typename S>
int pool_forward(const PoolForwardParams<S>& params, const PoolPlan& plan, void* stream);
template <typename S>
int pool_backward(const PoolBackwardParams<S>& params, const PoolPlan& plan, void* stream);
template <typename S>
int prefix_pool_forward(const PrefixPoolForwardParams<S>& params, const PoolPlan& plan, void* stream);
// Runs a plan with rounds; prefix_pool_forward() calls it.
template <typename S>
int prefix_pool_rounds(const PrefixPoolForwardParams<S>& params, const PoolPlan& plan, void* stream);
template <typename S>
int prefix_pool_backward(const PrefixPoolBackwardParams<S>& params, const PoolPlan& plan, void* stream);

}  // namespace cuda
}  // namespace llm_ext
