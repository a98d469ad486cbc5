// The launchers of attention on NVIDIA GPUs, and what each promises. Plain C++: no header of CUDA is needed.
//
// They take the params of params.h and queue all work of an op on a stream, without waiting; lengths and masks are read
// by kernels alone, and a length below 0 counts as 0, one above all positions as all. They return a cudaError_t (0:
// queued) and leave no error behind. Pointers are to the memory of the current device, tensors and workspace aligned to
// 16 bytes. Same input, plan and device, same bits. All exist for S = float, double, BFloat16, Float16.
#pragma once

#include <cstdint>

#include "cuda/rnn/plan.h"
#include "params/attention.h"
#include "params/linear.h"
#include "params/pooling.h"
#include "params/rnn.h"

namespace llm_ext {
namespace cuda {

// ---- pooling

constexpr int kPoolThreads = 256;  // a block

// How pooling shares its work. A team of threads owns a chunk of time of one row of the batch, its threads columns.
struct PoolPlan {
  int packs = 0;       // of 16 bytes of a row that a thread holds in registers: 1, 2 or 4; 0: any, one number at a time
  int team = 0;        // threads of a team, a power of two
  int64_t chunk = 0;   // positions of a chunk
  int64_t chunks = 1;  // of a row of the batch
  int teams = 0;  // of a row of the batch, all at work at the same time, a chunk each round after round; 0: no rounds

  // Whether a team goes through all of a row, with what it adds up in registers: then nobody has to merge.
  bool whole() const { return chunks == 1 && packs > 0; }
};

// The rule: as many teams as the device has room for, while a chunk is long against the summary it leaves.
PoolPlan make_pool_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes, int sm_count);
// For the prefix form forward: in rounds, where rows are few and long enough; else the other one.
PoolPlan make_prefix_plan(int64_t batch, int64_t steps, int64_t dim, int64_t element_bytes, const DeviceFacts& facts);

// Shared memory in rounds, in bytes, of a block and of each of its teams.
constexpr int kRoundSlots = 3;  // chunks of a team in shared memory
struct RoundsLayout {
  int sums;  // of a block, for sums over threads; then the teams
  int rows;  // of a team: its chunks
  int team;  // and their scores
};
constexpr RoundsLayout rounds_layout(const PoolPlan& plan, int64_t dim, int element_bytes, int computed_bytes) {
  const int positions = kRoundSlots * static_cast<int>(plan.chunk);
  const int rows = positions * static_cast<int>(dim) * element_bytes;
  return {2 * 8 * 8 * computed_bytes, rows, (rows + positions * computed_bytes + 15) / 16 * 16};
}

// Elements of Compute<S> that the workspace of a call must have.
int64_t pool_forward_workspace(int64_t batch, int64_t dim, const PoolPlan& plan);
int64_t pool_backward_workspace(int64_t batch, int64_t dim, const PoolPlan& plan);
int64_t prefix_pool_forward_workspace(int64_t batch, int64_t steps, int64_t dim, const PoolPlan& plan);
int64_t prefix_pool_backward_workspace(int64_t batch, int64_t steps, int64_t dim, const PoolPlan& plan);

// Any of B, T and D may be 0.
template <typename S>
int pool_forward(const PoolForwardParams<S>& params, const PoolPlan& plan, void* stream);
template <typename S>
int pool_backward(const PoolBackwardParams<S>& params, const PoolPlan& plan, void* stream);
template <typename S>
int prefix_pool_forward(const PrefixPoolForwardParams<S>& params, const PoolPlan& plan, void* stream);
// By a plan in rounds; the other calls it.
template <typename S>
int prefix_pool_rounds(const PrefixPoolForwardParams<S>& params, const PoolPlan& plan, void* stream);
template <typename S>
int prefix_pool_backward(const PrefixPoolBackwardParams<S>& params, const PoolPlan& plan, void* stream);

// ---- additive attention

// Rows of queries or keys that a block owns: 1, 8 or 32, as they are filled best.
constexpr int kMostAdditiveRows = 32;
int additive_rows(int64_t count);

// Queries of each row of the batch whose scores are in the workspace at once: all, or a multiple of 32, with which they
// take no more room than queries and keys.
int64_t additive_slab(int64_t queries, int64_t keys, int64_t attn_dim);

// What the workspace of a call is divided into. With nullptr as its begin it counts the elements.
template <typename S>
struct AdditiveWorkspace {
  Compute<S>* scores;      // [B, slab, Tk]
  Compute<S>* gradients;   // [B, slab, Tk] backward
  Compute<S>* dv;          // [B, tiles of queries, A] backward
  Compute<S>* key_sums;    // [B, Tk, A] backward, where there are several slabs
  Compute<S>* value_sums;  // [B, Tk, Dv] likewise
  bool* seen;              // [B, Tk] where each query has its own mask
  int64_t elements;        // of Compute<S>, in all

  AdditiveWorkspace(const AdditiveAttentionInput<S>& in, int64_t slab, bool backward, Compute<S>* begin) : elements(0) {
    const auto place = [&](int64_t count) {
      Compute<S>* at = begin == nullptr ? nullptr : begin + elements;
      elements += count;
      return at;
    };
    const int64_t rows = additive_rows(in.queries);
    const bool several = backward && slab < in.queries;
    scores = place(in.batch * slab * in.keys);
    gradients = place(backward ? in.batch * slab * in.keys : 0);
    dv = place(backward ? in.batch * ((in.queries + rows - 1) / rows) * in.attn_dim : 0);
    key_sums = place(several ? in.batch * in.keys * in.attn_dim : 0);
    value_sums = place(several ? in.batch * in.keys * in.value_dim : 0);
    const bool by_query = in.mask != nullptr && in.mask_query_stride != 0;
    const int64_t each = static_cast<int64_t>(sizeof(Compute<S>));
    seen = reinterpret_cast<bool*>(place(by_query ? (in.batch * in.keys + each - 1) / each : 0));
  }
};

// The workspace is that of the same slab and pass. Any size may be 0.
template <typename S>
int additive_attention_forward(const AdditiveAttentionForwardParams<S>& params, int64_t slab, void* stream);
template <typename S>
int additive_attention_backward(const AdditiveAttentionBackwardParams<S>& params, int64_t slab, void* stream);

}  // namespace cuda
}  // namespace llm_ext
