// The prefix form of attention pooling, backward, from the last position to the first: G_t = g_t + keep_{t+1} G_{t+1},
// and K_t likewise from the dot products g_t . c_t. Where there are many rows, prefix_pool_backward_rows.cu does so in
// one pass; here e and the gradient are read twice.
//
// A chunk does not know the state C before it, but c_t = l_t + p_t C, where l is the state that starts from zero and p
// the product of all keep up to t. So g_t . c_t = g_t . l_t + p_t g_t . C. A chunk passes on the sum of p_t g_t . c_t,
// which is the sum of p_t g_t . l_t plus C times the sum of p_t^2 g_t.
#include "cuda/device.cuh"
#include "cuda/pooling/chunks.cuh"
#include "cuda/pooling/columns.cuh"
#include "cuda/pooling/launchers.h"
#include "cuda/pooling/scan_chunks.cuh"
#include "cuda/reduce_partial_sums.h"

namespace llm_ext {
namespace cuda {
namespace {

template <typename S>
struct PrefixGradientParams {
  PrefixPoolBackwardParams<S> call;
  PoolPlan plan;
  Compute<S>* products;    // [B, T] g . l
  Compute<S>* passed;      // [B, T] p
  Compute<S>* g;           // [chunks, D] the gradient that a chunk passes on, then the one that it receives
  Compute<S>* crossed;     // [chunks, D] sum of p^2 g
  Compute<S>* states;      // [chunks, D] l at the end of a chunk, then C
  Compute<S>* k;           // [chunks] the sum of p_t g_t . l_t, then of p_t g_t . c_t
  Compute<S>* k_after;     // [chunks] K after the chunk
  Compute<S>* through;     // [chunks] p at the end of the chunk
  int64_t column_blocks;   // blocks of a row in the scan, for the sums over D:
  Compute<S>* dots;        // [chunks, column_blocks] C times the sum of p_t^2 g_t
  Compute<S>* with_c_n;    // [B, column_blocks] grad_c_n . c_n
  Compute<S>* with_c0;     // [B, column_blocks] dc0 . c0
  Compute<S>* partial_du;  // [chunks, D] out, shares memory with `crossed`; null: not wanted
};

// Runs in the opposite order of prefix_gradients, which then finds g and e in the L2 cache.
template <typename S, int N>
LLM_EXT_SHARING_KERNEL(kPoolThreads, kBlocks<N>)
void prefix_gradient_summaries(LLM_EXT_PARAMS PrefixGradientParams<S> p) {
  using T = Compute<S>;
  constexpr int R = kBackwardRows<N>;
  const PrefixPoolBackwardParams<S>& call = p.call;
  const PoolInput<S>& in = call.in;
  const Chunk chunk = chunk_of(p.plan, in.batch, in.steps, false);
  const Columns<S, N> columns(in.dim, p.plan);
  GroupSum<T> sum = group_sum<T>(p.plan.group_threads);
  const int64_t offset = offset_of(in, chunk.b, chunk.begin);
  const T* shares = call.share + chunk.b * in.steps + chunk.begin;
  const int count = static_cast<int>(chunk.end - chunk.begin);
  const auto load = [&](Tile<S, N, R>& g, Tile<S, N, R>& e, int i) {
    g.load(columns, [&](int r) {
      return i + r < count && call.grad_c != nullptr ? call.grad_c + offset + (i + r) * in.e_step_stride : nullptr;
    });
    e.load(columns, [&](int r) {
      return i + r < count && shares[i + r] != T(0) ? in.e + offset + (i + r) * in.e_step_stride : nullptr;
    });
  };

  Held<S, N> handed, crossed, l;
  const int64_t row = chunk.index * in.dim, first = chunk.b * in.steps + chunk.begin;
  handed.begin(columns, p.g + row, nullptr);
  crossed.begin(columns, p.crossed + row, nullptr);
  l.begin(columns, p.states + row, nullptr);
  T k = T(0), through = T(1);
  Tile<S, N, R> g, e;
  load(g, e, 0);
  for (int i = 0; i < static_cast<int>(p.plan.chunk); i += R) {
    Tile<S, N, R> next_g, next_e;
    load(next_g, next_e, i + R);
    T products[R] = {}, share[R], passed[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      share[r] = i + r < count ? shares[i + r] : T(0);
      through *= T(1) - share[r];
      passed[r] = through;
    }
    columns.for_each_number([&](int n, int64_t column, int j) {
      T state = l.at(n, column, j), once = handed.at(n, column, j), twice = crossed.at(n, column, j);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const T gradient = g.at(r, n, column, j), part = passed[r] * gradient;
        state = (T(1) - share[r]) * state + share[r] * e.at(r, n, column, j);
        products[r] += gradient * state;
        once += part;
        twice += passed[r] * part;
      }
      l.at(n, column, j) = state;
      handed.at(n, column, j) = once;
      crossed.at(n, column, j) = twice;
    });
    sum(products);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      k += passed[r] * products[r];
      if (i + r < count && columns.writes(r)) {
        p.products[first + i + r] = products[r];
        p.passed[first + i + r] = passed[r];
      }
    }
    g = next_g;
    e = next_e;
  }
  if (!chunk.exists) return;
  handed.end(columns, p.g + row);
  crossed.end(columns, p.crossed + row);
  l.end(columns, p.states + row);
  if (columns.rank == 0) {
    p.k[chunk.index] = k;
    p.through[chunk.index] = through;
  }
}

template <typename T>
LLM_EXT_DEVICE T sum_of_lanes(T x) {
#pragma unroll
  for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// The state before each chunk and the gradient after it, and this block's part of what K needs of them.
template <typename S>
LLM_EXT_SHARING_KERNEL(kPoolThreads, 2)
void prefix_gradient_scan(LLM_EXT_PARAMS PrefixGradientParams<S> p) {
  using T = Compute<S>;
  const PrefixPoolBackwardParams<S>& call = p.call;
  const int64_t D = call.in.dim, chunks = p.plan.chunks;
  const int64_t b = block_x() / p.column_blocks, column_block = block_x() % p.column_blocks;
  const int64_t column = column_block * kWarpThreads + lane_index(), row = b * chunks;
  const bool owns = column < D;
  const auto of_row = [&](const T* rows) { return rows == nullptr || !owns ? T(0) : rows[b * D + column]; };
  const auto in_chunk = [&](T* rows, int64_t i) -> T& { return rows[(row + i) * D + column]; };

  struct StateAndCrossed {
    T state, crossed;
    LLM_EXT_DEVICE explicit operator T() const { return state; }
  };
  const ChunkRange range(chunks);
  const T c0 = of_row(call.c0), g_n = of_row(call.grad_c_n);
  const T c_n = scan_chunks(
      chunks, c0,
      [&](int64_t first) {
        const int64_t i = first + lane_index();
        return i < range.end ? Factors<T>{p.through[row + i], T(1)} : Factors<T>{};
      },
      [&](int64_t i) {
        return owns ? StateAndCrossed{in_chunk(p.states, i), in_chunk(p.crossed, i)} : StateAndCrossed{};
      },
      [&](int64_t i, T c, const StateAndCrossed& read) {
        if (owns) in_chunk(p.states, i) = c;
        const T dot = sum_of_lanes(c * read.crossed);
        if (lane_index() == 0) p.dots[(row + i) * p.column_blocks + column_block] = dot;
      });
  // From the last chunk to the first.
  const T g = scan_chunks(
      chunks, g_n,
      [&](int64_t first) {
        const int64_t i = first + lane_index();
        return i < range.end ? Factors<T>{p.through[row + chunks - 1 - i], T(1)} : Factors<T>{};
      },
      [&](int64_t i) { return owns ? in_chunk(p.g, chunks - 1 - i) : T(0); },
      [&](int64_t i, T after, T) {
        if (owns) in_chunk(p.g, chunks - 1 - i) = after;
      });
  if (warp_index() > 0) return;
  if (owns && call.dc0 != nullptr) call.dc0[b * D + column] = g;
  const T with_c_n = sum_of_lanes(g_n * c_n), with_c0 = sum_of_lanes(g * c0);
  if (lane_index() > 0) return;
  p.with_c_n[block_x()] = with_c_n;
  p.with_c0[block_x()] = with_c0;
}

// K after each chunk. A block owns a batch row.
template <typename S>
LLM_EXT_SHARING_KERNEL(kPoolThreads, 2)
void prefix_gradient_k(LLM_EXT_PARAMS PrefixGradientParams<S> p) {
  using T = Compute<S>;
  const PrefixPoolBackwardParams<S>& call = p.call;
  const int64_t b = block_x(), chunks = p.plan.chunks, row = b * chunks;
  const auto sum_of_blocks = [&](const T* parts) {
    T sum = T(0);
    for (int64_t i = lane_index(); i < p.column_blocks; i += kWarpThreads) sum += parts[i];
    return sum_of_lanes(sum);
  };
  for (int64_t i = row + warp_index(); i < row + chunks; i += kPoolWarps) {
    const T sum = sum_of_blocks(p.dots + i * p.column_blocks);
    if (lane_index() == 0) p.k[i] += sum;
  }
  const T k_n = sum_of_blocks(p.with_c_n + b * p.column_blocks) - (call.grad_l_n == nullptr ? T(0) : call.grad_l_n[b]);
  block_barrier();
  const ChunkRange range(chunks);
  const T k = scan_chunks(
      chunks, k_n,
      [&](int64_t first) {
        const int64_t i = first + lane_index();
        return i < range.end ? Factors<T>{p.through[row + chunks - 1 - i], T(1)} : Factors<T>{};
      },
      [&](int64_t i) { return p.k[row + chunks - 1 - i]; },
      [&](int64_t i, T after, T) {
        if (lane_index() == 0) p.k_after[row + chunks - 1 - i] = after;
      });
  const T with_c0 = sum_of_blocks(p.with_c0 + b * p.column_blocks);
  if (call.dl0 != nullptr && thread_index() == 0) call.dl0[b] = with_c0 - k;
}

template <typename S, int N>
LLM_EXT_SHARING_KERNEL(kPoolThreads, kBlocks<N>)
void prefix_gradients(LLM_EXT_PARAMS PrefixGradientParams<S> p) {
  using T = Compute<S>;
  constexpr int R = kBackwardRows<N>;
  const PrefixPoolBackwardParams<S>& call = p.call;
  const PoolInput<S>& in = call.in;
  const Chunk chunk = chunk_of(p.plan, in.batch, in.steps, true);
  const Columns<S, N> columns(in.dim, p.plan);
  GroupSum<T> sum = group_sum<T>(p.plan.group_threads);
  // Row r of a tile is position end - 1 - r.
  const auto share_at = [&](int64_t t) { return t >= chunk.begin ? call.share[chunk.b * in.steps + t] : T(0); };
  const auto load_e = [&](Tile<S, N, R>& tile, int64_t end) {
    tile.load(columns, [&](int r) {
      const int64_t t = end - 1 - r;
      return chunk.exists && share_at(t) != T(0) ? in.e + offset_of(in, chunk.b, t) : nullptr;
    });
  };
  const auto load_g = [&](Tile<S, N, R>& tile, int64_t end) {
    tile.load(columns, [&](int r) {
      const int64_t t = end - 1 - r;
      return chunk.exists && call.grad_c != nullptr && t >= chunk.begin ? call.grad_c + offset_of(in, chunk.b, t)
                                                                        : nullptr;
    });
  };

  // If registers suffice: u and the state before the chunk stay in registers, and the next tile is loaded ahead.
  constexpr bool kAhead = N <= 2;
  [[maybe_unused]] Tile<S, N, 1> u;
  if constexpr (kAhead) u.load(columns, [&](int) { return in.u; });
  const auto u_at = [&](int n, int64_t column, int j) {
    if constexpr (kAhead) {
      return u.at(0, n, column, j);
    } else {
      return in.u != nullptr && column < in.dim ? widen(in.u[column + j]) : T(0);
    }
  };
  constexpr int kHeld = kAhead ? N : 0;
  Held<S, N> carried, du;
  [[maybe_unused]] Held<S, kHeld> before;
  T* from = p.g + chunk.index * in.dim;
  T* c_before = p.states + chunk.index * in.dim;
  carried.begin(columns, from, from);
  if constexpr (kHeld == N) before.begin(columns, c_before, c_before);
  const auto before_at = [&](int n, int64_t column, int j) {
    if constexpr (kHeld == N) {
      return before.at(n, column, j);
    } else {
      return column < in.dim ? c_before[column + j] : T(0);
    }
  };
  const bool wants_du = p.partial_du != nullptr && chunk.exists;
  if (wants_du || N > 0) du.begin(columns, N > 0 ? nullptr : p.partial_du + chunk.index * in.dim, nullptr);
  T k = chunk.exists ? p.k_after[chunk.index] : T(0);
  Tile<S, N, R> e, g;
  load_e(e, chunk.end);
  load_g(g, chunk.end);
  for (int64_t i = 0; i < p.plan.chunk; i += R) {
    const int64_t end = chunk.end - i;
    [[maybe_unused]] Tile<S, N, R> next_e, next_g;
    if constexpr (kAhead) {
      load_e(next_e, end - R);
      load_g(next_g, end - R);
    }
    // G . e, and g . C.
    T share[R], dots[2 * R] = {};
#pragma unroll
    for (int r = 0; r < R; ++r) share[r] = chunk.exists ? share_at(end - 1 - r) : T(0);
    columns.for_each_number([&](int n, int64_t column, int j) {
      T state = carried.at(n, column, j);
      const T c = before_at(n, column, j);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        state += g.at(r, n, column, j);
        dots[r] += state * e.at(r, n, column, j);
        dots[R + r] += g.at(r, n, column, j) * c;
        state *= T(1) - share[r];
      }
    });
    sum(dots);
    T ds[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t t = end - 1 - r;
      ds[r] = T(0);
      if (!chunk.exists || t < chunk.begin) continue;
      k += p.products[chunk.b * in.steps + t] + p.passed[chunk.b * in.steps + t] * dots[R + r];
      if (share[r] != T(0)) ds[r] = share[r] * (dots[r] - k);
      k *= T(1) - share[r];
      if (call.dscores != nullptr && columns.writes(r)) {
        call.dscores[chunk.b * in.steps + t] = narrow<S>(ds[r]);
      }
    }
    if (chunk.exists) {
      columns.for_each([&](int n, int64_t column) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const int64_t t = end - 1 - r;
          const bool writes = call.de != nullptr && column < in.dim && t >= chunk.begin;
          write_pack<N>(writes ? call.de + offset_of(in, chunk.b, t) + column : nullptr, [&](int j) {
            T& state = carried.at(n, column, j);
            const T gradient = state + g.at(r, n, column, j);
            state = (T(1) - share[r]) * gradient;
            if (wants_du) du.at(n, column, j) += ds[r] * e.at(r, n, column, j);
            return share[r] * gradient + ds[r] * u_at(n, column, j);
          });
        }
      });
    }
    if constexpr (kAhead) {
      e = next_e;
      g = next_g;
    } else {
      load_e(e, end - R);
      load_g(g, end - R);
    }
  }
  if (wants_du) du.end(columns, p.partial_du + chunk.index * in.dim);
}

}  // namespace

template <typename S>
int prefix_pool_backward(const PrefixPoolBackwardParams<S>& call, const PoolPlan& plan, void* stream) {
  using T = Compute<S>;
  if (plan.slot > 0) return prefix_pool_backward_rows(call, plan, stream);
  const PoolInput<S>& in = call.in;
  const int64_t all_chunks = in.batch * plan.chunks;
  PrefixGradientParams<S> p = {};
  p.call = call;
  p.plan = plan;
  p.g = call.workspace;
  p.crossed = p.g + all_chunks * in.dim;
  p.partial_du = call.du == nullptr ? nullptr : p.crossed;
  p.states = p.crossed + all_chunks * in.dim;
  p.k = p.states + all_chunks * in.dim;
  p.k_after = p.k + all_chunks;
  p.through = p.k_after + all_chunks;
  p.products = p.through + all_chunks;
  p.passed = p.products + in.batch * in.steps;
  p.column_blocks = column_blocks_of(in.dim);
  p.dots = p.passed + in.batch * in.steps;
  p.with_c_n = p.dots + all_chunks * p.column_blocks;
  p.with_c0 = p.with_c_n + in.batch * p.column_blocks;
  int error = with_packs(plan, [&](auto packs) {
    return launch_chunks<T>(prefix_gradient_summaries<S, packs()>, p, plan, in.batch, stream);
  });
  if (error != 0) return error;
  error = launch_blocks<T>(prefix_gradient_scan<S>, p, in.batch * p.column_blocks, stream, kScanBytes<T>);
  if (error != 0) return error;
  error = launch_blocks<T>(prefix_gradient_k<S>, p, in.batch, stream, kScanBytes<T>);
  if (error != 0) return error;
  error = with_packs(
      plan, [&](auto packs) { return launch_chunks<T>(prefix_gradients<S, packs()>, p, plan, in.batch, stream); });
  if (error != 0 || call.du == nullptr) return error;
  return reduce_partial_sums(PartialSums<S>{1, all_chunks, in.dim, p.partial_du, nullptr, call.du, nullptr, nullptr},
                             stream);
}

#define FOR(S) template int prefix_pool_backward(const PrefixPoolBackwardParams<S>&, const PoolPlan&, void*);
FOR(float)
FOR(double)
FOR(BFloat16)
FOR(Float16)
#undef FOR

}  // namespace cuda
}  // namespace llm_ext
