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
// Blocks that a multiprocessor has registers for, by PoolPlan::packs.
constexpr int blocks_per_sm(int packs) { return packs == 1 ? 2 : 1; }

// The partition of a call. A thread group owns a chunk of time of one batch row; its threads own columns.
struct PoolPlan {
  int packs = 0;  // 16-byte packs of a row that a thread holds in registers: 1, 2 or 4; 0: any D, one number at a
                  // time
  int group_threads = 0;  // threads per thread group, a power of two
  int64_t chunk = 0;      // positions per chunk
  int64_t chunks = 1;     // per batch row
  int64_t slot = 0;  // prefix form, backward, in one pass: positions that are in shared memory at once; 0: two passes

  // Whether a thread group processes a whole row with its sums in registers: then nothing is left to reduce.
  bool whole() const { return chunks == 1 && packs > 0; }
};

// As many thread groups as the device has room for, with chunks that are long compared to their summary.
PoolPlan make_pool_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes, const DeviceFacts& facts);
// Backward, whose threads hold more of each column.
PoolPlan make_pool_gradient_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes,
                                 const DeviceFacts& facts);
// The prefix form, backward: in one pass if a chunk is a row.
PoolPlan make_prefix_gradient_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes,
                                   const DeviceFacts& facts);

// Shared memory of a block that goes backward in one pass, in bytes: rows of e and of the gradient, and of c before
// them; shares and dot products.
constexpr int kSlots = 2;  // of a thread group
struct SlotsLayout {
  int sums;   // per block, for sums over threads; the thread groups follow
  int rows;   // per thread group
  int group;  // per thread group: rows and numbers of its positions
};
constexpr SlotsLayout slots_layout(const PoolPlan& plan, int64_t dim, int element_bytes, int computed_bytes) {
  const int numbers = 2 * static_cast<int>(plan.slot);
  const int bytes = kSlots * (numbers + 1) * static_cast<int>(dim) * element_bytes;
  return {2 * 8 * 8 * computed_bytes, bytes, (bytes + kSlots * numbers * computed_bytes + 15) / 16 * 16};
}

// Blocks that share the columns of a row, a column a lane, in scans over its chunks.
constexpr int64_t column_blocks_of(int64_t dim) { return dim > 0 ? (dim + kWarpThreads - 1) / kWarpThreads : 1; }

// Elements of pooled rows in a workspace. A LogSum, whose two numbers may be accessed at once, follows: hence even.
inline int64_t pooled_rows_size(int64_t rows, int64_t dim) { return (rows * dim + 1) / 2 * 2; }

// Workspace of a call, in elements of Compute<S>.
int64_t pool_forward_workspace(int64_t batch, int64_t steps, int64_t dim, const PoolPlan& plan);
int64_t pool_backward_workspace(int64_t batch, int64_t steps, int64_t dim, const PoolPlan& plan);
int64_t prefix_pool_forward_workspace(int64_t batch, int64_t steps, int64_t dim, const PoolPlan& plan);
int64_t prefix_pool_backward_workspace(int64_t batch, int64_t steps, int64_t dim, const PoolPlan& plan);

// B, T and D may be 0.
template <typename S>
int pool_forward(const PoolForwardParams<S>& params, const PoolPlan& plan, void* stream);
template <typename S>
int pool_backward(const PoolBackwardParams<S>& params, const PoolPlan& plan, void* stream);
template <typename S>
int prefix_pool_forward(const PrefixPoolForwardParams<S>& params, const PoolPlan& plan, void* stream);
template <typename S>
int prefix_pool_backward(const PrefixPoolBackwardParams<S>& params, const PoolPlan& plan, void* stream);
// Runs plans with slots; prefix_pool_backward() calls it.
template <typename S>
int prefix_pool_backward_rows(const PrefixPoolBackwardParams<S>& params, const PoolPlan& plan, void* stream);

}  // namespace cuda
}  // namespace llm_ext
