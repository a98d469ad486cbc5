// Plans of attention pooling.
#include <algorithm>

#include "cuda/pooling/launchers.h"

namespace llm_ext {
namespace cuda {
namespace {

constexpr int64_t kPackBytes = 16;
constexpr int64_t kMaxPacks = 4;
constexpr int64_t kBlocksPerSm = 2;     // as the kernels are compiled
constexpr int64_t kShortestChunk = 64;  // positions; the summary is 1/16 of the chunk, in 16 bits 1/8
constexpr int64_t kChunkMultiple = 8;   // positions; chunks are whole tiles

// Rounds: thread groups per row, positions per chunk, and rounds per row. Not tuned.
constexpr int kMinRoundGroups = 2;
constexpr int kMaxRoundGroups = 1024;
constexpr int64_t kLongestRoundChunk = 64;
constexpr int64_t kMinRounds = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

PoolPlan make_pool_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes, int sm_count) {
  PoolPlan plan;
  const int64_t packs = dim * element_bytes / kPackBytes;
  if (dim > 0 && dim * element_bytes % kPackBytes == 0 && packs <= kPoolThreads * kMaxPacks) {
    plan.packs = 1;
    while (packs > kPoolThreads * plan.packs) plan.packs *= 2;
    plan.group_threads = 1;
    while (packs > plan.group_threads * plan.packs) plan.group_threads *= 2;
  } else {
    plan.packs = 0;
    plan.group_threads = kPoolThreads;
  }
  const int64_t groups = kBlocksPerSm * sm_count * (kPoolThreads / plan.group_threads);
  // Half of the device with whole rows is as fast as the whole device with chunks.
  const int64_t wanted =
      2 * batch >= groups ? 1 : std::min(groups / std::max<int64_t>(batch, 1), ceil_div(steps, kShortestChunk));
  plan.chunk = ceil_div(ceil_div(steps, std::max<int64_t>(wanted, 1)), kChunkMultiple) * kChunkMultiple;
  plan.chunks = std::max<int64_t>(plan.chunk > 0 ? ceil_div(steps, plan.chunk) : 1, 1);
  return plan;
}

PoolPlan make_prefix_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes, const DeviceFacts& facts) {
  const PoolPlan plain = make_pool_plan(batch, steps, dim, element_bytes, facts.sm_count);
  if (plain.packs == 0 || plain.chunks < kMinRoundGroups || batch == 0) return plain;
  PoolPlan plan = plain;
  const int in_block = kPoolThreads / plan.group_threads;
  plan.round_groups = static_cast<int>(std::min<int64_t>(int64_t{facts.sm_count} * in_block / batch, kMaxRoundGroups));
  plan.chunk = kChunkMultiple;
  const int computed = element_bytes == 8 ? 8 : 4;
  const auto fits = [&](int64_t chunk) {
    PoolPlan longer = plan;
    longer.chunk = chunk;
    const RoundsLayout layout = rounds_layout(longer, dim, static_cast<int>(element_bytes), computed);
    return chunk <= kLongestRoundChunk && layout.sums + in_block * layout.group <= facts.shared_bytes;
  };
  // In the scan a thread owns one column; and the pipeline takes some rounds to fill.
  if (plan.round_groups < kMinRoundGroups || plan.round_groups * int64_t{plan.group_threads} < dim || !fits(plan.chunk))
    return plain;
  while (fits(plan.chunk + kChunkMultiple)) plan.chunk += kChunkMultiple;
  return steps >= kMinRounds * plan.round_groups * plan.chunk ? plan : plain;
}

int64_t pool_forward_workspace(int64_t batch, int64_t dim, const PoolPlan& plan) {
  const int64_t chunks = batch * plan.chunks;
  return plan.whole() ? 0 : pooled_rows_size(chunks, dim) + 2 * chunks;
}

int64_t pool_backward_workspace(int64_t batch, int64_t dim, const PoolPlan& plan) { return batch * plan.chunks * dim; }

int64_t prefix_pool_forward_workspace(int64_t batch, int64_t steps, int64_t dim, const PoolPlan& plan) {
  // The flags of rounds take at most as much memory as two elements.
  if (plan.round_groups > 0) return batch * plan.round_groups * (kRoundSlots * (dim + 4) + 2);
  const int64_t chunks = batch * plan.chunks;
  return plan.whole() ? 0 : pooled_rows_size(chunks, dim) + 4 * chunks + batch * steps;
}

int64_t prefix_pool_backward_workspace(int64_t batch, int64_t steps, int64_t dim, const PoolPlan& plan) {
  return batch * plan.chunks * (3 * dim + 3) + 2 * batch * steps;
}

}  // namespace cuda
}  // namespace llm_ext
