// Plans of attention pooling.
#include <algorithm>

#include "cuda/pooling/launchers.h"

namespace llm_ext {
namespace cuda {
namespace {

constexpr int64_t kPackBytes = 16;
constexpr int64_t kMaxPacks = 4;
constexpr int64_t kShortestChunk = 64;  // positions; the summary is 1/16 of the chunk, in 16 bits 1/8
constexpr int64_t kChunkMultiple = 8;   // positions; chunks are whole tiles

// Rounds: thread groups per row, positions per chunk, and rounds per row. Not tuned.
constexpr int kMinRoundGroups = 2;
constexpr int kMaxRoundGroups = 1024;
constexpr int64_t kLongestRoundChunk = 64;
constexpr int64_t kMinRounds = 4;
// Backward: chunks are shorter, because two rows of each position are in shared memory, and wider rows have no room.
constexpr int64_t kGradientChunkMultiple = 2;
constexpr int kMaxGradientPacks = 2;
constexpr int64_t kReservedShared = 1024;  // bytes of a multiprocessor's shared memory that a block takes in addition

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The plan with rounds of `round_groups` thread groups per row, whose chunks are the longest multiple of `multiple` for
// which a block has `room`; `plan` itself if there is none.
PoolPlan with_rounds(const PoolPlan& plan, int64_t round_groups, int64_t dim, int64_t element_bytes,
                     decltype(rounds_layout)& layout_of, int64_t multiple, int64_t room) {
  PoolPlan best = plan, longer = plan;
  longer.round_groups = static_cast<int>(round_groups);
  for (longer.chunk = multiple; longer.chunk <= kLongestRoundChunk; longer.chunk += multiple) {
    const RoundsLayout layout =
        layout_of(longer, dim, static_cast<int>(element_bytes), static_cast<int>(std::max<int64_t>(element_bytes, 4)));
    if (layout.sums + kPoolThreads / plan.group_threads * layout.group > room) break;
    best = longer;
  }
  return best;
}

// The plan with rounds of several resident thread groups per row; `plan` itself if there are too few or too many of
// them for the row.
PoolPlan with_resident_rounds(const PoolPlan& plan, int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes,
                              const DeviceFacts& facts, decltype(rounds_layout)& layout_of, int64_t multiple) {
  const int64_t resident = int64_t{facts.sm_count} * (kPoolThreads / plan.group_threads);
  const int64_t groups = std::min<int64_t>(resident / batch, kMaxRoundGroups);
  // In the scan a thread owns one column.
  if (groups < kMinRoundGroups || groups * plan.group_threads < dim) return plan;
  const PoolPlan rounds = with_rounds(plan, groups, dim, element_bytes, layout_of, multiple, facts.shared_bytes);
  // The pipeline takes some rounds to fill.
  return steps >= kMinRounds * rounds.round_groups * rounds.chunk ? rounds : plan;
}

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
  const int64_t groups = int64_t{blocks_per_sm(plan.packs)} * sm_count * (kPoolThreads / plan.group_threads);
  const int64_t room = groups / std::max<int64_t>(batch, 1);  // chunks of a row that run at the same time
  // Whole rows on half of the device are as fast as two chunks a row on all of it.
  const int64_t wanted = room <= 2 ? 1 : std::min(room, ceil_div(steps, kShortestChunk));
  plan.chunk = ceil_div(ceil_div(steps, std::max<int64_t>(wanted, 1)), kChunkMultiple) * kChunkMultiple;
  plan.chunks = std::max<int64_t>(plan.chunk > 0 ? ceil_div(steps, plan.chunk) : 1, 1);
  return plan;
}

PoolPlan make_prefix_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes, const DeviceFacts& facts) {
  const PoolPlan plan = make_pool_plan(batch, steps, dim, element_bytes, facts.sm_count);
  if (plan.packs == 0 || plan.chunks == 1 || batch == 0) return plan;
  return with_resident_rounds(plan, batch, steps, dim, element_bytes, facts, rounds_layout, kChunkMultiple);
}

PoolPlan make_prefix_gradient_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes,
                                   const DeviceFacts& facts) {
  const PoolPlan plan = make_pool_plan(batch, steps, dim, element_bytes, facts.sm_count);
  if (plan.packs == 0 || plan.packs > kMaxGradientPacks || batch == 0) return plan;
  if (plan.chunks > 1) {
    if (element_bytes < 4) return plan;
    return with_resident_rounds(plan, batch, steps, dim, element_bytes, facts, gradient_rounds_layout,
                                kGradientChunkMultiple);
  }
  const int64_t room = (facts.shared_bytes + kReservedShared) / blocks_per_sm(plan.packs) - kReservedShared;
  return with_rounds(plan, 1, dim, element_bytes, gradient_rounds_layout, kGradientChunkMultiple, room);
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
  if (plan.round_groups == 1) return batch * dim;
  // As forward.
  if (plan.round_groups > 1) return batch * plan.round_groups * (dim + kRoundSlots * (dim + 3) + 3);
  return batch * plan.chunks * (3 * dim + 3) + 2 * batch * steps;
}

}  // namespace cuda
}  // namespace llm_ext
