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
// Blocks that a multiprocessor has registers for, by PoolPlan::packs; kernels of rounds that wait for others have one.
constexpr int blocks_per_sm(int packs) { return packs == 1 ? 2 : 1; }

// The partition of a call. A thread group owns a chunk of time of one batch row; its threads own columns.
struct PoolPlan {
  int packs = 0;  // 16-byte packs of a row that a thread holds in registers: 1, 2 or 4; 0: any D, one number at a
                  // time
  int group_threads = 0;  // threads per thread group, a power of two
  int64_t chunk = 0;      // positions per chunk
  int64_t chunks = 1;     // per batch row
  int round_groups = 0;   // thread groups per batch row, which take a chunk each per round, all resident if they are
                          // several; 0: no rounds

  // Whether a thread group processes a whole row with its sums in registers: then nothing is left to reduce.
  bool whole() const { return chunks == 1 && packs > 0; }
};

// As many thread groups as the device has room for, with chunks that are long compared to their summary.
PoolPlan make_pool_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes, int sm_count);
// The prefix form: rounds if rows are few and long enough, otherwise make_pool_plan().
PoolPlan make_prefix_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes, const DeviceFacts& facts);
// Its backward pass: likewise, but not in 16 bits, and rounds of one thread group per row if there are many rows, or
// short ones.
PoolPlan make_prefix_gradient_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes,
                                   const DeviceFacts& facts);

// Shared memory of a block that runs rounds, in bytes.
constexpr int kRoundSlots = 3;  // chunks of a thread group in shared memory
// Backward, a thread group that has a row of its own waits for no other.
constexpr int gradient_slots(int round_groups) { return round_groups > 1 ? kRoundSlots : 2; }
struct RoundsLayout {
  int sums;   // per block, for sums over threads; the thread groups follow
  int rows;   // per thread group: the rows of its chunks
  int group;  // per thread group: rows and numbers of its positions
};
constexpr RoundsLayout layout_of_rounds(int rows, int numbers, int64_t dim, int element_bytes, int computed_bytes) {
  const int bytes = rows * static_cast<int>(dim) * element_bytes;
  return {2 * 8 * 8 * computed_bytes, bytes, (bytes + numbers * computed_bytes + 15) / 16 * 16};
}
// Forward: rows of e and scores.
constexpr RoundsLayout rounds_layout(const PoolPlan& plan, int64_t dim, int element_bytes, int computed_bytes) {
  const int positions = kRoundSlots * static_cast<int>(plan.chunk);
  return layout_of_rounds(positions, positions, dim, element_bytes, computed_bytes);
}
// Backward: rows of e and of the gradient, and of c before them; shares and dot products.
constexpr RoundsLayout gradient_rounds_layout(const PoolPlan& plan, int64_t dim, int element_bytes,
                                              int computed_bytes) {
  const int slots = gradient_slots(plan.round_groups), numbers = 2 * static_cast<int>(plan.chunk);
  return layout_of_rounds(slots * (numbers + 1), slots * numbers, dim, element_bytes, computed_bytes);
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
template <typename S>
int prefix_pool_backward(const PrefixPoolBackwardParams<S>& params, const PoolPlan& plan, void* stream);
// Run plans with rounds; prefix_pool_forward() and prefix_pool_backward() call them.
template <typename S>
int prefix_pool_rounds(const PrefixPoolForwardParams<S>& params, const PoolPlan& plan, void* stream);
template <typename S>
int prefix_pool_gradient_rounds(const PrefixPoolBackwardParams<S>& params, const PoolPlan& plan, void* stream);

}  // namespace cuda
}  // namespace llm_ext
