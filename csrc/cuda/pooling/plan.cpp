// Plans of attention pooling.
#include <algorithm>

#include "cuda/pooling/launchers.h"

namespace llm_ext {
namespace cuda {
namespace {

constexpr int64_t kPackBytes = 16;
constexpr int kMaxPacks = 4;
constexpr int kMaxGradientPacks = 2;    // backward: with more the kernels of the prefix form would not load ahead
constexpr int64_t kShortestChunk = 32;  // positions; its summary has a quarter of its bytes in 16 bits
constexpr int64_t kChunkMultiple = 8;   // positions; chunks are whole tiles

// Backward in one pass, in positions. Slots are whole tiles; longer ones save no bytes worth counting.
constexpr int64_t kSlotMultiple = 2;
constexpr int64_t kLongestSlot = 64;
constexpr int64_t kReservedShared = 1024;  // bytes of a multiprocessor's shared memory that a block takes in addition

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// With `packs` per thread; the threads of a thread group are as many as the row requires.
PoolPlan with_packs(int packs, int64_t row_packs, int64_t batch, int64_t steps, int sm_count) {
  PoolPlan plan;
  plan.packs = packs;
  plan.group_threads = packs == 0 ? kPoolThreads : 1;
  while (packs > 0 && row_packs > int64_t{plan.group_threads} * packs) plan.group_threads *= 2;
  const int64_t groups = int64_t{blocks_per_sm(packs)} * sm_count * (kPoolThreads / plan.group_threads);
  const int64_t room = groups / std::max<int64_t>(batch, 1);  // chunks of a row that run at the same time
  // Whole rows on half of the device are as fast as two chunks a row on all of it.
  const int64_t wanted = room <= 2 ? 1 : std::min(room, ceil_div(steps, kShortestChunk));
  plan.chunk = ceil_div(ceil_div(steps, std::max<int64_t>(wanted, 1)), kChunkMultiple) * kChunkMultiple;
  plan.chunks = std::max<int64_t>(plan.chunk > 0 ? ceil_div(steps, plan.chunk) : 1, 1);
  return plan;
}

// Instructions are the limit, and each thread of a group has those of the sums over the group and of the exponentials.
// So a group has no more threads than a warp, if packs allow and almost all multiprocessors have a block then.
PoolPlan make_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes, int sm_count, int max_packs) {
  const int64_t row_packs = dim * element_bytes / kPackBytes;
  if (dim == 0 || dim * element_bytes % kPackBytes != 0 || row_packs > int64_t{kPoolThreads} * kMaxPacks) {
    return with_packs(0, 0, batch, steps, sm_count);
  }
  int packs = 1;
  while (row_packs > int64_t{kPoolThreads} * packs) packs *= 2;
  PoolPlan best = with_packs(packs, row_packs, batch, steps, sm_count);
  while (packs < max_packs && best.group_threads > kWarpThreads) {
    packs *= 2;
    const PoolPlan wider = with_packs(packs, row_packs, batch, steps, sm_count);
    const int64_t blocks = batch * wider.chunks * wider.group_threads / kPoolThreads;
    if (8 * blocks < 7 * int64_t{sm_count}) break;
    best = wider;
  }
  return best;
}

}  // namespace

PoolPlan make_pool_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes, const DeviceFacts& facts) {
  return make_plan(batch, steps, dim, element_bytes, facts.sm_count, kMaxPacks);
}

PoolPlan make_pool_gradient_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes,
                                 const DeviceFacts& facts) {
  return make_plan(batch, steps, dim, element_bytes, facts.sm_count, kMaxGradientPacks);
}

PoolPlan make_prefix_gradient_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes,
                                   const DeviceFacts& facts) {
  PoolPlan plan = make_pool_gradient_plan(batch, steps, dim, element_bytes, facts);
  if (!plan.whole() || plan.packs > kMaxGradientPacks || batch == 0) return plan;
  const int64_t room = (facts.shared_bytes + kReservedShared) / blocks_per_sm(plan.packs) - kReservedShared;
  PoolPlan longer = plan;
  for (longer.slot = kSlotMultiple; longer.slot <= kLongestSlot; longer.slot += kSlotMultiple) {
    const SlotsLayout layout = slots_layout(longer, dim, static_cast<int>(element_bytes),
                                            static_cast<int>(std::max<int64_t>(element_bytes, 4)));
    if (layout.sums + kPoolThreads / plan.group_threads * layout.group > room) break;
    plan = longer;
  }
  return plan;
}

int64_t pool_forward_workspace(int64_t batch, int64_t /*steps*/, int64_t dim, const PoolPlan& plan) {
  const int64_t chunks = batch * plan.chunks;
  return plan.whole() ? 0 : pooled_rows_size(chunks, dim) + 2 * chunks;
}

int64_t pool_backward_workspace(int64_t batch, int64_t /*steps*/, int64_t dim, const PoolPlan& plan) {
  return batch * plan.chunks * dim;
}

int64_t prefix_pool_forward_workspace(int64_t batch, int64_t steps, int64_t dim, const PoolPlan& plan) {
  const int64_t chunks = batch * plan.chunks;
  return plan.whole() ? 0 : pooled_rows_size(chunks, dim) + 4 * chunks + batch * steps;
}

int64_t prefix_pool_backward_workspace(int64_t batch, int64_t steps, int64_t dim, const PoolPlan& plan) {
  if (plan.slot > 0) return batch * dim;
  const int64_t chunks = batch * plan.chunks;
  return chunks * (3 * dim + 3) + 2 * batch * steps + (chunks + 2 * batch) * column_blocks_of(dim);
}

}  // namespace cuda
}  // namespace llm_ext
