// The prefix form of attention pooling, forward, over chunks: c_t = keep_t c_{t-1} + share_t e_t.
//
// If a chunk is a whole row, one kernel writes the states. Otherwise e is read twice: pool_chunks() leaves the summary
// of each chunk, a scan over the chunks turns summaries into the state before each chunk, and the last kernel writes
// the states. Few and long rows run in rounds instead (prefix_rounds.cu), which read e once.
#include "cuda/device.cuh"
#include "cuda/pooling/chunk_summaries.h"
#include "cuda/pooling/chunks.cuh"
#include "cuda/pooling/columns.cuh"
#include "cuda/pooling/launchers.h"

namespace llm_ext {
namespace cuda {
namespace {

template <typename S>
struct PrefixParams {
  PrefixPoolForwardParams<S> call;
  PoolPlan plan;
  const Compute<S>* scores;  // [B, T] from pool_chunks(); null: a chunk is a whole row, scores are computed here
  const LogSum<Compute<S>>* l_before;  // [chunks] log-sum-exp before each chunk; null: without scores
  Compute<S>* c_before;                // [chunks, D] the state before each chunk; scratch if packs is 0; null: zeros
};

template <typename S, int N>
LLM_EXT_SHARING_KERNEL(kPoolThreads, kBlocks<N>)
void prefix_states(LLM_EXT_PARAMS PrefixParams<S> p) {
  using T = Compute<S>;
  constexpr int R = kForwardRows<N>;
  const PoolInput<S>& in = p.call.in;
  const Chunk chunk = chunk_of(p.plan, in.batch, in.steps, true);
  const Columns<S, N> columns(in.dim, p.plan);
  const AttendedPositions<S> attended(in, chunk.b, chunk.begin, chunk.end);
  const int count = static_cast<int>(chunk.end - chunk.begin);
  const int64_t first = chunk.b * in.steps + chunk.begin;  // of the chunk's first position
  GroupSum<T> sum = group_sum<T>(p.plan.group_threads);
  const S* rows = in.e + offset_of(in, chunk.b, chunk.begin);
  const auto load = [&](Tile<S, N, R>& tile, int i) {
    tile.load(columns, [&](int r) { return attended.attends(i + r) ? rows + (i + r) * in.e_step_stride : nullptr; });
  };

  Tile<S, N, 1> u;
  u.load(columns, [&](int) { return p.scores == nullptr ? in.u : nullptr; });
  LogSum<T> l = p.l_before == nullptr ? no_scores<T>() : given_log_sum(p.l_before[chunk.index]);
  Held<S, N> c;
  T* c_before = p.c_before == nullptr ? nullptr : p.c_before + chunk.index * in.dim;
  if (chunk.exists || N > 0) c.begin(columns, c_before, c_before);
  S* c_rows = p.call.c + offset_of(in, chunk.b, chunk.begin);
  Tile<S, N, R> e;
  load(e, 0);
  for (int i = 0; i < static_cast<int>(p.plan.chunk); i += R) {
    Tile<S, N, R> next;
    load(next, i + R);
    T scores[R], keep[R], share[R];
    if (p.scores == nullptr) {
      score(in, columns, e, u, in.scores + first + i, sum, scores);
    } else {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        scores[r] = e.present(r) ? p.scores[first + i + r] : -kInfinity<T>;
      }
    }
    prefix_shares(scores, l, keep, share);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (columns.writes(r) && i + r < count) p.call.share[first + i + r] = share[r];
    }
    write_states(columns, c, e, keep, share, c_rows + i * in.e_step_stride, in.e_step_stride, count - i);
    e = next;
  }
  if (!chunk.exists || p.scores != nullptr) return;
  if (columns.rank == 0) p.call.l_n[chunk.b] = l;
  c.end(columns, p.call.c_n + chunk.b * in.dim);
}

// Replaces the summary of each chunk by the state before it, in place, and writes the state after the last chunk.
template <typename S>
struct ScanParams {
  int64_t column_blocks, chunks, dim;  // column_blocks: blocks that share a row
  const LogSum<Compute<S>>* l;         // [B, chunks]
  LogSum<Compute<S>>* l_before;        // [B, chunks] out
  Compute<S>* c;                       // [B, chunks, D] in and out
  const LogSum<Compute<S>>* l0;        // [B]; null: without scores
  const Compute<S>* c0;                // [B, D]; null exactly where l0 is: zeros
  LogSum<Compute<S>>* l_n;             // [B] out
  Compute<S>* c_n;                     // [B, D] out
};

// A thread owns a column of a batch row. It loads kAhead chunks before it needs them.
template <typename S>
LLM_EXT_SHARING_KERNEL(kPoolThreads, 2)
void prefix_scan(LLM_EXT_PARAMS ScanParams<S> p) {
  using T = Compute<S>;
  constexpr int kAhead = 64 / sizeof(T);  // of three numbers in registers
  const int64_t b = block_x() / p.column_blocks, column = block_x() % p.column_blocks * kPoolThreads + thread_index();
  if (column >= p.dim && column > 0) return;
  const bool owns = column < p.dim;
  LogSum<T> l = p.l0 == nullptr ? no_scores<T>() : given_log_sum(p.l0[b]);
  T c = p.c0 == nullptr || !owns ? T(0) : p.c0[b * p.dim + column];
  for (int64_t first = b * p.chunks; first < (b + 1) * p.chunks; first += kAhead) {
    LogSum<T> of_l[kAhead];
    T of_c[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const bool there = first + i < (b + 1) * p.chunks;
      of_l[i] = there ? p.l[first + i] : no_scores<T>();
      of_c[i] = there && owns ? p.c[(first + i) * p.dim + column] : T(0);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= (b + 1) * p.chunks) continue;
      if (column == 0) p.l_before[first + i] = l;
      if (owns) p.c[(first + i) * p.dim + column] = c;
      T keep, share;
      add_scores(l, of_l[i], keep, share);
      c = keep * c + share * of_c[i];
    }
  }
  if (column == 0) p.l_n[b] = l;
  if (owns) p.c_n[b * p.dim + column] = c;
}

}  // namespace

template <typename S>
int prefix_pool_forward(const PrefixPoolForwardParams<S>& call, const PoolPlan& plan, void* stream) {
  using T = Compute<S>;
  const PoolInput<S>& in = call.in;
  if (plan.round_groups > 0) return prefix_pool_rounds(call, plan, stream);
  PrefixParams<S> p = {call, plan, nullptr, call.l0, const_cast<T*>(call.c0)};
  if (!plan.whole()) {
    const int64_t all_chunks = in.batch * plan.chunks;
    T* c = call.workspace;
    auto* l = reinterpret_cast<LogSum<T>*>(c + pooled_rows_size(all_chunks, in.dim));
    LogSum<T>* l_before = l + all_chunks;
    T* scores = reinterpret_cast<T*>(l_before + all_chunks);
    int error = pool_chunks(ChunkSummaries<S>{in, plan, nullptr, c, l, nullptr, scores}, stream);
    if (error != 0) return error;
    const int64_t column_blocks = in.dim > 0 ? (in.dim + kPoolThreads - 1) / kPoolThreads : 1;
    error = launch_blocks<T>(
        prefix_scan<S>,
        ScanParams<S>{column_blocks, plan.chunks, in.dim, l, l_before, c, call.l0, call.c0, call.l_n, call.c_n},
        in.batch * column_blocks, stream);
    if (error != 0) return error;
    p.scores = scores;
    p.l_before = l_before;
    p.c_before = c;
  }
  return with_packs(plan,
                    [&](auto packs) { return launch_chunks<T>(prefix_states<S, packs()>, p, plan, in.batch, stream); });
}

#define FOR(S) template int prefix_pool_forward(const PrefixPoolForwardParams<S>&, const PoolPlan&, void*);
FOR(float)
FOR(double)
FOR(BFloat16)
FOR(Float16)
#undef FOR

}  // namespace cuda
}  // namespace llm_ext
