// The pooled vector of each chunk: all of pooling's forward pass, and the first pass of the prefix form over chunks.
#include "cuda/device.cuh"
#include "cuda/pooling/chunk_summaries.h"
#include "cuda/pooling/chunks.cuh"
#include "cuda/pooling/columns.cuh"

namespace llm_ext {
namespace cuda {
namespace {

template <typename S, int N>
LLM_EXT_SHARING_KERNEL(kPoolThreads, kBlocks<N>)
void pool_chunks_kernel(LLM_EXT_PARAMS ChunkSummaries<S> p) {
  using T = Compute<S>;
  constexpr int R = kForwardRows<N>;
  const PoolInput<S>& in = p.in;
  const Chunk chunk = chunk_of(p.plan, in.batch, in.steps, false);
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
  u.load(columns, [&](int) { return in.u; });
  Pooled<S, N> pooled;
  pooled.begin(columns, p.partial_c + chunk.index * in.dim);
  Tile<S, N, R> e;
  load(e, 0);
  for (int i = 0; i < static_cast<int>(p.plan.chunk); i += R) {
    Tile<S, N, R> next;
    load(next, i + R);
    T weights[R];
    score(in, columns, e, u, in.scores + first + i, sum, weights);
    if (p.scores_out != nullptr) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (columns.writes(r) && i + r < count) p.scores_out[first + i + r] = weights[r];
      }
    }
    pooled.add(columns, e, weights);
    e = next;
  }
  if (!chunk.exists) return;
  const LogSum<T> l = pooled.end(columns);
  if (columns.rank == 0) {
    p.l[chunk.index] = l;
    if (p.lse != nullptr) p.lse[chunk.index] = log_sum_exp(l);
  }
  if (p.c != nullptr) {
    write_row(columns, p.c + chunk.index * in.dim,
              [&](int i, int64_t column, int j) { return pooled.c.at(i, column, j); });
  } else {
    pooled.c.end(columns, p.partial_c + chunk.index * in.dim);
  }
}

}  // namespace

template <typename S>
int pool_chunks(const ChunkSummaries<S>& call, void* stream) {
  return with_packs(call.plan, [&](auto packs) {
    return launch_chunks<Compute<S>>(pool_chunks_kernel<S, packs()>, call, call.plan, call.in.batch, stream);
  });
}

template int pool_chunks(const ChunkSummaries<float>&, void*);
template int pool_chunks(const ChunkSummaries<double>&, void*);
template int pool_chunks(const ChunkSummaries<BFloat16>&, void*);
template int pool_chunks(const ChunkSummaries<Float16>&, void*);

}  // namespace cuda
}  // namespace llm_ext
