// The rules that attention.h promises.
#include <algorithm>

#include "cuda/attention/launchers.h"

namespace llm_ext {
namespace cuda {
namespace {

constexpr int64_t kPackBytes = 16;
constexpr int64_t kMaxPacks = 4;
constexpr int64_t kBlocksEach = 2;  // of a multiprocessor, as the kernels are compiled
constexpr int64_t kShortest = 64;   // positions of a chunk: its summary is then 1/16 of it, or in 16 bits 1/8
constexpr int64_t kChunkUnits = 8;  // chunks are whole tiles of so many positions

// Rounds: teams of a row, positions of a chunk, and rounds of a row. Not measured yet.
constexpr int kLeastTeams = 2;
constexpr int kMostTeams = 1024;
constexpr int64_t kLongestRound = 64;
constexpr int64_t kLeastRounds = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

PoolPlan make_pool_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes, int sm_count) {
  PoolPlan plan;
  const int64_t packs = dim * element_bytes / kPackBytes;
  if (dim > 0 && dim * element_bytes % kPackBytes == 0 && packs <= kPoolThreads * kMaxPacks) {
    plan.packs = 1;
    while (packs > kPoolThreads * plan.packs) plan.packs *= 2;
    plan.team = 1;
    while (packs > plan.team * plan.packs) plan.team *= 2;
  } else {
    plan.packs = 0;
    plan.team = kPoolThreads;
  }
  const int64_t teams = kBlocksEach * sm_count * (kPoolThreads / plan.team);
  // Half of the device at work with each row gone through once is as quick as all of it with every row in chunks.
  const int64_t wanted =
      2 * batch >= teams ? 1 : std::min(teams / std::max<int64_t>(batch, 1), ceil_div(steps, kShortest));
  plan.chunk = ceil_div(ceil_div(steps, std::max<int64_t>(wanted, 1)), kChunkUnits) * kChunkUnits;
  plan.chunks = std::max<int64_t>(plan.chunk > 0 ? ceil_div(steps, plan.chunk) : 1, 1);
  return plan;
}

PoolPlan make_prefix_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes, const DeviceFacts& facts) {
  const PoolPlan plain = make_pool_plan(batch, steps, dim, element_bytes, facts.sm_count);
  if (plain.packs == 0 || plain.chunks < kLeastTeams || batch == 0) return plain;
  PoolPlan plan = plain;
  const int in_block = kPoolThreads / plan.team;
  plan.teams = static_cast<int>(std::min<int64_t>(int64_t{facts.sm_count} * in_block / batch, kMostTeams));
  plan.chunk = kChunkUnits;
  const int computed = element_bytes == 8 ? 8 : 4;
  const auto fits = [&](int64_t chunk) {
    PoolPlan longer = plan;
    longer.chunk = chunk;
    const RoundsLayout layout = rounds_layout(longer, dim, static_cast<int>(element_bytes), computed);
    return chunk <= kLongestRound && layout.sums + in_block * layout.team <= facts.shared_bytes;
  };
  // A thread has one column of its team's share of them; and it takes some rounds before the pipe is full.
  if (plan.teams < kLeastTeams || plan.teams * int64_t{plan.team} < dim || !fits(plan.chunk)) return plain;
  while (fits(plan.chunk + kChunkUnits)) plan.chunk += kChunkUnits;
  return steps >= kLeastRounds * plan.teams * plan.chunk ? plan : plain;
}

int64_t pool_forward_workspace(int64_t batch, int64_t dim, const PoolPlan& plan) {
  return plan.whole() ? 0 : batch * plan.chunks * (dim + 1);
}

int64_t pool_backward_workspace(int64_t batch, int64_t dim, const PoolPlan& plan) { return batch * plan.chunks * dim; }

int64_t prefix_pool_forward_workspace(int64_t batch, int64_t steps, int64_t dim, const PoolPlan& plan) {
  // The flags of rounds take as much room as two numbers at most.
  if (plan.teams > 0) return batch * plan.teams * (kRoundSlots * (dim + 2) + 2);
  return plan.whole() ? 0 : batch * plan.chunks * (dim + 2) + batch * steps;
}

int64_t prefix_pool_backward_workspace(int64_t batch, int64_t steps, int64_t dim, const PoolPlan& plan) {
  return batch * plan.chunks * (3 * dim + 3) + 2 * batch * steps;
}

int additive_rows(int64_t count) {
  if (count <= 1) return 1;
  const int64_t by_few = ceil_div(count, 8) * 8, by_many = ceil_div(count, kMostAdditiveRows) * kMostAdditiveRows;
  // A tile of many has less to bring for each pair.
  return 5 * by_few <= 4 * by_many ? 8 : kMostAdditiveRows;
}

int64_t additive_slab(int64_t queries, int64_t keys, int64_t attn_dim) {
  const int64_t room = (queries + keys) * std::max<int64_t>(attn_dim, 1);
  if (queries * keys <= room) return queries;
  return std::max<int64_t>(room / keys / kMostAdditiveRows, 1) * kMostAdditiveRows;
}

}  // namespace cuda
}  // namespace llm_ext
