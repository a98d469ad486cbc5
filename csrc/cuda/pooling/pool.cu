// Attention pooling, forward and backward. docs/math/attention.md derives the formulas.
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/pooling/chunk_summaries.h"
#include "cuda/pooling/chunks.cuh"
#include "cuda/pooling/columns.cuh"
#include "cuda/pooling/launchers.h"
#include "cuda/reduce_partial_sums.h"

namespace llm_ext {
namespace cuda {
namespace {

template <typename S>
struct PoolGradientParams {
  PoolBackwardParams<S> call;
  PoolPlan plan;
  Compute<S>* partial_du;  // [chunks, D] out; null: not wanted
};

template <typename S, int N>
LLM_EXT_SHARING_KERNEL(kPoolThreads, kBlocks<N>)
void pool_gradients(LLM_EXT_PARAMS PoolGradientParams<S> p) {
  using T = Compute<S>;
  constexpr int R = kBackwardRows<N>;
  const PoolInput<S>& in = p.call.in;
  const Chunk chunk = chunk_of(p.plan, in.batch, in.steps, false);
  const Columns<S, N> columns(in.dim, p.plan);
  const AttendedPositions<S> attended(in, chunk.b, chunk.begin, chunk.end);
  const int count = static_cast<int>(chunk.end - chunk.begin);
  const int64_t first = chunk.b * in.steps + chunk.begin;  // of the chunk's first position
  GroupSum<T> sum = group_sum<T>(p.plan.group_threads);
  const LogSum<T> l = p.call.l[chunk.b];
  const T scale = T(1) / l.sum;
  const S* rows = in.e + offset_of(in, chunk.b, chunk.begin);
  const auto load = [&](Tile<S, N, R>& tile, int i) {
    tile.load(columns, [&](int r) {
      return attended.attends(i + r) && l.max != -kInfinity<T> ? rows + (i + r) * in.e_step_stride : nullptr;
    });
  };

  Tile<S, N, 1> u, g;
  u.load(columns, [&](int) { return in.u; });
  g.load(columns, [&](int) { return p.call.grad_c == nullptr ? nullptr : p.call.grad_c + chunk.b * in.dim; });
  Held<S, N> du;
  const bool wants_du = p.partial_du != nullptr && chunk.exists;
  if (wants_du || N > 0) du.begin(columns, N > 0 ? nullptr : p.partial_du + chunk.index * in.dim, nullptr);
  // g . c, which every ds contains.
  T along[1] = {T(0)};
  const auto load_c = [&] {
    Tile<S, N, 1> c;
    c.load(columns, [&](int) { return p.call.c + chunk.b * in.dim; });
    return c;
  };
  {
    const Tile<S, N, 1> c = load_c();
    columns.for_each_number(
        [&](int i, int64_t column, int j) { along[0] += g.at(0, i, column, j) * c.at(0, i, column, j); });
    sum(along);
  }
  const T of_lse = p.call.grad_lse == nullptr ? T(0) : p.call.grad_lse[chunk.b];
  T excess = T(0);  // sum of alpha (g . e - g . c): over a whole row 0, except for the rounding of c

  S* de = p.call.de == nullptr ? nullptr : p.call.de + offset_of(in, chunk.b, chunk.begin);
  Tile<S, N, R> e;
  load(e, 0);
  for (int i = 0; i < static_cast<int>(p.plan.chunk); i += R) {
    Tile<S, N, R> next;
    load(next, i + R);
    T sums[2 * R] = {};
    columns.for_each_number([&](int n, int64_t column, int j) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        sums[r] += e.at(r, n, column, j) * u.at(0, n, column, j);
        sums[R + r] += e.at(r, n, column, j) * g.at(0, n, column, j);
      }
    });
    sum(sums);
    T alpha[R], ds[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      T s = -kInfinity<T>;
      if (e.present(r)) s = in.u != nullptr ? sums[r] : widen(in.scores[first + i + r]);
      alpha[r] = e.present(r) ? share_of(s - l.max) * scale : T(0);
      const T slope = e.present(r) ? alpha[r] * (sums[R + r] - along[0]) : T(0);
      excess += slope;
      ds[r] = e.present(r) ? slope + alpha[r] * of_lse : T(0);
      if (i + r >= count) continue;
      if (p.call.dscores != nullptr && columns.writes(r)) {
        p.call.dscores[first + i + r] = narrow<S>(ds[r]);
      }
      if (de != nullptr) {
        write_row(columns, de + (i + r) * in.e_step_stride, [&](int n, int64_t column, int j) {
          return alpha[r] * g.at(0, n, column, j) + ds[r] * u.at(0, n, column, j);
        });
      }
    }
    if (wants_du) {
      columns.for_each_number([&](int n, int64_t column, int j) {
        T value = du.at(n, column, j);
#pragma unroll
        for (int r = 0; r < R; ++r) value += ds[r] * e.at(r, n, column, j);
        du.at(n, column, j) = value;
      });
    }
    e = next;
  }
  if (!wants_du) return;
  if constexpr (!std::is_same_v<S, T>) {
    // The rounding error of c is the same in g . c of all ds and would add up in du; subtract it.
    const Tile<S, N, 1> c = load_c();
    columns.for_each_number([&](int n, int64_t column, int j) {
      if (column < in.dim) du.at(n, column, j) -= excess * c.at(0, n, column, j);
    });
  }
  du.end(columns, p.partial_du + chunk.index * in.dim);
}

}  // namespace

template <typename S>
int pool_forward(const PoolForwardParams<S>& call, const PoolPlan& plan, void* stream) {
  const PoolInput<S>& in = call.in;
  if (plan.whole()) return pool_chunks(ChunkSummaries<S>{in, plan, call.c, nullptr, call.l, call.lse, nullptr}, stream);
  auto* l = reinterpret_cast<LogSum<Compute<S>>*>(call.workspace + pooled_rows_size(in.batch * plan.chunks, in.dim));
  const int error = pool_chunks(ChunkSummaries<S>{in, plan, nullptr, call.workspace, l, nullptr, nullptr}, stream);
  if (error != 0) return error;
  return reduce_partial_sums(PartialSums<S>{in.batch, plan.chunks, in.dim, call.workspace, l, call.c, call.l, call.lse},
                             stream);
}

template <typename S>
int pool_backward(const PoolBackwardParams<S>& call, const PoolPlan& plan, void* stream) {
  const PoolInput<S>& in = call.in;
  const PoolGradientParams<S> p = {call, plan, call.du == nullptr ? nullptr : call.workspace};
  const int error = with_packs(plan, [&](auto packs) {
    return launch_chunks<Compute<S>>(pool_gradients<S, packs()>, p, plan, in.batch, stream);
  });
  if (error != 0 || call.du == nullptr) return error;
  return reduce_partial_sums(
      PartialSums<S>{1, in.batch * plan.chunks, in.dim, p.partial_du, nullptr, call.du, nullptr, nullptr}, stream);
}

#define FOR(S)                                                                    \
  template int pool_forward(const PoolForwardParams<S>&, const PoolPlan&, void*); \
  template int pool_backward(const PoolBackwardParams<S>&, const PoolPlan&, void*);
FOR(float)
FOR(double)
FOR(BFloat16)
FOR(Float16)
#undef FOR

}  // namespace cuda
}  // namespace llm_ext
