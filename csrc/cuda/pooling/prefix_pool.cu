// The prefix form of attention pooling, forward, over chunks: c_t = keep_t c_{t-1} + share_t e_t.
//
// If a chunk is a whole row, one kernel writes the states. Otherwise e is read twice: pool_chunks() leaves the summary
// of each chunk, a scan over the chunks turns summaries into the state before each chunk, and the last kernel writes
// the states.
#include "cuda/device.cuh"
#include "cuda/pooling/chunk_summaries.h"
#include "cuda/pooling/chunks.cuh"
#include "cuda/pooling/columns.cuh"
#include "cuda/pooling/launchers.h"
#include "cuda/pooling/scan_chunks.cuh"

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
  int64_t column_blocks, chunks, dim;  // column_blocks: blocks of a row
  const LogSum<Compute<S>>* l;         // [B, chunks]
  LogSum<Compute<S>>* l_before;        // [B, chunks] out
  Compute<S>* c;                       // [B, chunks, D] in and out
  const LogSum<Compute<S>>* l0;        // [B]; null: without scores
  const Compute<S>* c0;                // [B, D]; null exactly where l0 is: zeros
  LogSum<Compute<S>>* l_n;             // [B] out
  Compute<S>* c_n;                     // [B, D] out
};

template <typename T>
LLM_EXT_DEVICE LogSum<T> sum_of(LogSum<T> l, const LogSum<T>& added) {
  T keep, share;
  add_scores(l, added, keep, share);
  return l;
}
template <typename T>
LLM_EXT_DEVICE LogSum<T> from_lane(const LogSum<T>& l, int lane) {
  return {shuffle(l.max, lane), shuffle(l.sum, lane)};
}

template <typename S>
LLM_EXT_SHARING_KERNEL(kPoolThreads, 2)
void prefix_scan(LLM_EXT_PARAMS ScanParams<S> p) {
  using T = Compute<S>;
  const int64_t b = block_x() / p.column_blocks, column_block = block_x() % p.column_blocks;
  const int64_t column = column_block * kWarpThreads + lane_index(), row = b * p.chunks;
  const bool owns = column < p.dim;
  const ChunkRange range(p.chunks);

  // The log-sum-exps before this warp's range and after all.
  LogSum<T> own = no_scores<T>();
  for (int64_t i = range.begin + lane_index(); i < range.end; i += kWarpThreads) own = sum_of(own, p.l[row + i]);
#pragma unroll
  for (int mask = 1; mask < kWarpThreads; mask *= 2) {
    own = sum_of(own, {shuffle_xor(own.max, mask), shuffle_xor(own.sum, mask)});
  }
  LogSum<T>* of_ranges = reinterpret_cast<LogSum<T>*>(shared_memory());
  if (lane_index() == 0) of_ranges[warp_index()] = own;
  block_barrier();
  LogSum<T> before_range = no_scores<T>(), l = p.l0 == nullptr ? no_scores<T>() : given_log_sum(p.l0[b]);
  for (int w = 0; w < kPoolWarps; ++w) {
    if (w == warp_index()) before_range = l;
    l = sum_of(l, of_ranges[w]);
  }

  LogSum<T> running = before_range;
  const auto factors_of = [&](int64_t first) {
    if (first == range.begin) running = before_range;
    const int64_t i = first + lane_index();
    const LogSum<T> chunk = i < range.end ? p.l[row + i] : no_scores<T>();
    LogSum<T> until = chunk;  // of the chunks of the lanes up to this one
#pragma unroll
    for (int lanes = 1; lanes < kWarpThreads; lanes *= 2) {
      const LogSum<T> earlier = from_lane(until, (lane_index() - lanes) & (kWarpThreads - 1));
      if (lane_index() >= lanes) until = sum_of(earlier, until);
    }
    const LogSum<T> earlier = from_lane(until, (lane_index() - 1) & (kWarpThreads - 1));
    LogSum<T> before = lane_index() == 0 ? running : sum_of(running, earlier);
    if (column_block == 0 && i < range.end) p.l_before[row + i] = before;
    running = sum_of(running, from_lane(until, kWarpThreads - 1));
    Factors<T> factors;
    add_scores(before, chunk, factors.keep, factors.share);
    return factors;
  };
  T* summaries = p.c + row * p.dim + column;
  const T c = scan_chunks(
      p.chunks, p.c0 == nullptr || !owns ? T(0) : p.c0[b * p.dim + column], factors_of,
      [&](int64_t i) { return owns ? summaries[i * p.dim] : T(0); },
      [&](int64_t i, T before, T) {
        if (owns) summaries[i * p.dim] = before;
      });
  if (warp_index() > 0) return;
  if (column == 0) p.l_n[b] = l;
  if (owns) p.c_n[b * p.dim + column] = c;
}

}  // namespace

template <typename S>
int prefix_pool_forward(const PrefixPoolForwardParams<S>& call, const PoolPlan& plan, void* stream) {
  using T = Compute<S>;
  const PoolInput<S>& in = call.in;
  PrefixParams<S> p = {call, plan, nullptr, call.l0, const_cast<T*>(call.c0)};
  if (!plan.whole()) {
    const int64_t all_chunks = in.batch * plan.chunks;
    T* c = call.workspace;
    auto* l = reinterpret_cast<LogSum<T>*>(c + pooled_rows_size(all_chunks, in.dim));
    LogSum<T>* l_before = l + all_chunks;
    T* scores = reinterpret_cast<T*>(l_before + all_chunks);
    int error = pool_chunks(ChunkSummaries<S>{in, plan, nullptr, c, l, nullptr, scores}, stream);
    if (error != 0) return error;
    const int64_t column_blocks = column_blocks_of(in.dim);
    error = launch_blocks<T>(
        prefix_scan<S>,
        ScanParams<S>{column_blocks, plan.chunks, in.dim, l, l_before, c, call.l0, call.c0, call.l_n, call.c_n},
        in.batch * column_blocks, stream, kScanBytes<T>);
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
