// The rules that attention.h promises.
#include <algorithm>

#include "cuda/attention.h"

namespace llm_ext {
namespace cuda {
namespace {

constexpr int64_t kPackBytes = 16;
constexpr int64_t kMaxPacks = 4;
constexpr int64_t kBlocksEach = 2;  // of a multiprocessor, as the kernels are compiled
constexpr int64_t kShortest = 64;   // positions of a chunk: its summary is then 1/16 of it, or in 16 bits 1/8
constexpr int64_t kChunkUnits = 8;  // chunks are whole tiles of so many positions

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

int64_t pool_forward_workspace(int64_t batch, int64_t dim, const PoolPlan& plan) {
  return plan.whole() ? 0 : batch * plan.chunks * (dim + 1);
}

int64_t pool_backward_workspace(int64_t batch, int64_t dim, const PoolPlan& plan) { return batch * plan.chunks * dim; }

int64_t prefix_pool_forward_workspace(int64_t batch, int64_t steps, int64_t dim, const PoolPlan& plan) {
  return plan.whole() ? 0 : batch * plan.chunks * (dim + 2) + batch * steps;
}

int64_t prefix_pool_backward_workspace(int64_t batch, int64_t steps, int64_t dim, const PoolPlan& plan) {
  return batch * plan.chunks * (2 * dim + 3) + batch * steps;
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
