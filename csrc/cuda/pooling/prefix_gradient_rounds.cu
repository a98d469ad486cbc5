// The prefix form of attention pooling, backward, in one pass: e and its gradient are read once, the results written
// once. The formulas are those of prefix_pool_backward.cu; the state before a chunk is the row of c before it.
//
// In 16 bits that row is rounded, and its error would add up in K. So K gains G . (c - c') after a chunk, where c is
// its last state and c' the row from which the later states began: the gradient of L, G . c - K, does not change.
//
// Few and long rows run in the rounds of prefix_rounds.cu, from the last position to the first, but not in 16 bits,
// where G . (c - c') would be one more sum to exchange:
//
// round i      a chunk has arrived in shared memory; compute its states, dot products and what it passes on
// round i + 1  scan: each thread group owns some columns and replaces what the chunks pass on by what they receive
// round i + 2  write the gradients of the chunk from what it receives
//
// A thread group that has a batch row of its own passes the gradient on in registers, and writes in the same round.
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/pooling/columns.cuh"
#include "cuda/pooling/launchers.h"
#include "cuda/pooling/rounds.cuh"
#include "cuda/reduce_partial_sums.h"

namespace llm_ext {
namespace cuda {
namespace {

template <typename S>
struct GradientRoundsParams {
  using T = Compute<S>;
  PrefixPoolBackwardParams<S> call;
  PoolPlan plan;
  RoundsLayout layout;
  int rounds;
  int slots;      // chunks of a thread group in shared memory
  T* partial_du;  // [B groups, D] out; null: not wanted
  // If a row has several groups, of the chunks of the last rounds:
  T* g;               // [kRoundSlots, B groups, D] the gradient that a chunk passes on, then the one that it receives
  T* k;               // [kRoundSlots, B groups] the sum of p_t g_t . c_t
  T* k_after;         // [kRoundSlots, B groups] K after the chunk
  T* through;         // [kRoundSlots, B groups] p at the end of the chunk
  T* with_c0;         // [B groups] parts of the product of dc0 and c0
  uint32_t* summed;   // [B groups] flags: rounds whose sums are stored
  uint32_t* scanned;  // [B groups] flags: rounds whose columns are scanned
};

template <typename S, int N>
LLM_EXT_SHARING_KERNEL(kPoolThreads, kBlocks<N>)
void prefix_gradient_rounds(LLM_EXT_PARAMS GradientRoundsParams<S> p) {
  using T = Compute<S>;
  constexpr int R = kBackwardRows<N>;
  constexpr bool kRounded = !std::is_same_v<S, T>;
  const PrefixPoolBackwardParams<S>& call = p.call;
  const PoolInput<S>& in = call.in;
  const int chunk = static_cast<int>(p.plan.chunk);
  const RoundGroup group(p.plan, in.batch);
  const bool alone = kRounded || group.groups == 1;
  const int64_t all_groups = in.batch * group.groups, b = group.b, D = in.dim;
  const Columns<S, N> columns(D, p.plan);
  GroupSum<T> sum = group_sum<T>(p.plan.group_threads);

  // The positions of a round: `count_of` of them before `end_of`. No thread group has more of them than the
  // first one of a row.
  const auto left_of = [&](int i, int rank) {
    const int64_t left = in.steps - (static_cast<int64_t>(i) * group.groups + rank) * chunk;
    return left < 0 ? int64_t{0} : left;
  };
  const auto end_of = [&](int i) { return left_of(i, group.rank); };
  const auto at_most = [&](int i, int rank) {
    const int64_t left = left_of(i, rank);
    return static_cast<int>(left < chunk ? left : chunk);
  };
  const auto count_of = [&](int i) { return group.exists ? at_most(i, group.rank) : 0; };
  // A slot of the thread group has rows of e and grad_c and the row of c before them, and numbers of each position.
  unsigned char* own = shared_memory() + p.layout.sums + group.in_block * p.layout.group;
  const auto row_at = [&](int i, int r) { return reinterpret_cast<S*>(own) + (i % p.slots * (2 * chunk + 1) + r) * D; };
  const auto e_at = [&](int i, int r) { return row_at(i, r); };
  const auto g_at = [&](int i, int r) { return row_at(i, chunk + r); };
  const auto before_at = [&](int i) { return row_at(i, 2 * chunk); };
  const auto shares_at = [&](int i) { return reinterpret_cast<T*>(own + p.layout.rows) + i % p.slots * 2 * chunk; };
  const auto products_at = [&](int i) { return shares_at(i) + chunk; };

  // Each thread copies the columns that it will read.
  const auto load_round = [&](int i) {
    if (i >= p.rounds) return;
    const int count = count_of(i);
    if (count == 0) return;
    const int64_t begin = end_of(i) - count, offset = offset_of(in, b, begin);
    const T* shares = call.share + b * in.steps + begin;
    const auto copy = [&](S* to, const S* from) {
      columns.for_each([&](int, int64_t column) {
        if (column < D) copy_async(to + column, from + column);
      });
    };
    constexpr int kShares = 4;
    for (int r0 = 0; r0 < count; r0 += kShares) {
      T share[kShares];
#pragma unroll
      for (int r = 0; r < kShares; ++r) share[r] = r0 + r < count ? shares[r0 + r] : T(0);
#pragma unroll
      for (int r = 0; r < kShares; ++r) {
        if (r0 + r >= count) continue;
        const int64_t at = offset + (r0 + r) * in.e_step_stride;
        if (columns.writes(r)) shares_at(i)[r0 + r] = share[r];
        if (share[r] != T(0)) copy(e_at(i, r0 + r), in.e + at);
        if (call.grad_c != nullptr) copy(g_at(i, r0 + r), call.grad_c + at);
      }
    }
    if (begin > 0) copy(before_at(i), call.c + offset - in.e_step_stride);
  };

  const auto add = [&](Held<S, N>& state, T factor, const S* row) {
    Tile<S, N, 1> tile;
    tile.load(columns, [&](int) { return row; });
    columns.for_each_number(
        [&](int n, int64_t column, int j) { state.at(n, column, j) += factor * tile.at(0, n, column, j); });
  };
  // The state before position t >= 0, whose row of c is `row` if t > 0.
  const auto begin_state = [&](Held<S, N>& state, int64_t t, const S* row) {
    state.begin(columns, nullptr, t > 0 || call.c0 == nullptr ? nullptr : call.c0 + b * D);
    if (t > 0) add(state, T(1), row);
  };
  const auto with = [&](Held<S, N>& x, Held<S, N>& y) {
    T product[1] = {T(0)};
    columns.for_each_number(
        [&](int n, int64_t column, int j) { product[0] += x.at(n, column, j) * y.at(n, column, j); });
    sum(product);
    return product[0];
  };

  // G and K after the last position; then, if the thread group is alone, after the chunk that is next. In 16 bits K
  // gains G . c of the last position with the first chunk.
  Held<S, N> carried;
  carried.begin(columns, nullptr, group.exists && call.grad_c_n != nullptr ? call.grad_c_n + b * D : nullptr);
  T k = group.exists && call.grad_l_n != nullptr ? -call.grad_l_n[b] : T(0);
  if (!kRounded || p.rounds == 0) {
    Held<S, N> last;
    begin_state(last, group.exists ? in.steps : 0, call.c + offset_of(in, b, in.steps - 1));
    k += with(carried, last);
  }

  const auto summarise = [&](int i) {
    const int count = count_of(i);
    Held<S, N> state, passed_on;
    begin_state(state, count > 0 ? end_of(i) - count : 0, before_at(i));
    // The row from which the states of the later positions began.
    [[maybe_unused]] const S* counted = count > 0 && i > 0 ? call.c + offset_of(in, b, end_of(i) - 1) : nullptr;
    passed_on.begin(columns, nullptr, nullptr);
    T passed_k = T(0), through = T(1);
    const int most = at_most(i, 0);
    for (int r0 = 0; r0 < most; r0 += R) {
      T products[R] = {}, share[R], passed[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        share[r] = r0 + r < count ? shares_at(i)[r0 + r] : T(0);
        through *= T(1) - share[r];
        passed[r] = through;
      }
      Tile<S, N, R> e, g;
      e.load(columns, [&](int r) { return share[r] != T(0) ? e_at(i, r0 + r) : nullptr; });
      g.load(columns, [&](int r) { return r0 + r < count && call.grad_c != nullptr ? g_at(i, r0 + r) : nullptr; });
      columns.for_each_number([&](int n, int64_t column, int j) {
        T c = state.at(n, column, j), once = passed_on.at(n, column, j);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const T gradient = g.at(r, n, column, j);
          c = (T(1) - share[r]) * c + share[r] * e.at(r, n, column, j);
          products[r] += gradient * c;
          once += passed[r] * gradient;
        }
        state.at(n, column, j) = c;
        passed_on.at(n, column, j) = once;
      });
      sum(products);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        passed_k += passed[r] * products[r];
        if (columns.writes(r) && r0 + r < count) products_at(i)[r0 + r] = products[r];
      }
    }
    if constexpr (kRounded) {
      add(state, T(-1), counted);
      k += with(carried, state);
    }
    if (alone) {
      block_barrier();
      return;
    }
    if (group.exists) {
      const int64_t slot = i % kRoundSlots * all_groups + group.index;
      passed_on.end(columns, p.g + slot * D);
      if (columns.rank == 0) {
        p.k[slot] = passed_k;
        p.through[slot] = through;
      }
    }
    group.raise(p.summed, i + 1);
  };

  // The columns of the scan that this thread group owns, one per thread.
  const int width = static_cast<int>((D + group.groups - 1) / group.groups);
  const int64_t column = static_cast<int64_t>(group.rank) * width + columns.rank;
  const bool scans = group.exists && !alone && columns.rank < width && column < D;
  T g_after = call.grad_c_n == nullptr || !scans ? T(0) : call.grad_c_n[b * D + column];
  const auto scan = [&](int i) {
    constexpr int kAhead = 32 / sizeof(T);  // of three numbers in registers
    group.await_all(p.summed, i + 1);
    const int64_t first = i % kRoundSlots * all_groups + group.first;
    for (int n0 = 0; group.exists && n0 < group.groups; n0 += kAhead) {
      T of_g[kAhead], of_k[kAhead], through[kAhead];
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        const bool there = n0 + n < group.groups;
        of_g[n] = there && scans ? p.g[(first + n0 + n) * D + column] : T(0);
        of_k[n] = there ? p.k[first + n0 + n] : T(0);
        through[n] = there ? p.through[first + n0 + n] : T(1);
      }
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        if (n0 + n >= group.groups) continue;
        if (scans) p.g[(first + n0 + n) * D + column] = g_after;
        if (group.rank == 0 && columns.rank == 0) p.k_after[first + n0 + n] = k;
        g_after = of_g[n] + through[n] * g_after;
        k = of_k[n] + through[n] * k;
      }
    }
    group.raise(p.scanned, i + 1);
  };

  Tile<S, N, 1> u;
  u.load(columns, [&](int) { return in.u; });
  Held<S, N> du;
  du.begin(columns, nullptr, nullptr);
  const auto write = [&](int i) {
    const int count = count_of(i);
    T k_at = k;
    if (!alone) {
      group.await_all(p.scanned, i + 1);
      const int64_t slot = i % kRoundSlots * all_groups + group.index;
      carried.begin(columns, nullptr, group.exists ? p.g + slot * D : nullptr);
      k_at = group.exists ? p.k_after[slot] : T(0);
    }
    const int most = at_most(i, 0);
    for (int r0 = 0; r0 < most; r0 += R) {
      // Row r of a tile is position last - r of the chunk.
      const int last = count - 1 - r0;
      T share[R], dots[R] = {}, ds[R];
#pragma unroll
      for (int r = 0; r < R; ++r) share[r] = r <= last ? shares_at(i)[last - r] : T(0);
      Tile<S, N, R> e, g;
      e.load(columns, [&](int r) { return share[r] != T(0) ? e_at(i, last - r) : nullptr; });
      g.load(columns, [&](int r) { return r <= last && call.grad_c != nullptr ? g_at(i, last - r) : nullptr; });
      columns.for_each_number([&](int n, int64_t column, int j) {
        T state = carried.at(n, column, j);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          state += g.at(r, n, column, j);
          dots[r] += state * e.at(r, n, column, j);
          state *= T(1) - share[r];
        }
      });
      sum(dots);
      const int64_t t = end_of(i) - 1 - r0;  // of row 0
#pragma unroll
      for (int r = 0; r < R; ++r) {
        ds[r] = T(0);
        if (r > last) continue;
        k_at += products_at(i)[last - r];
        if (share[r] != T(0)) ds[r] = share[r] * (dots[r] - k_at);
        k_at *= T(1) - share[r];
        if (call.dscores != nullptr && columns.writes(r)) call.dscores[b * in.steps + t - r] = narrow<S>(ds[r]);
      }
      S* de = call.de == nullptr ? nullptr : call.de + offset_of(in, b, t);
      columns.for_each([&](int n, int64_t column) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const bool writes = de != nullptr && column < D && r <= last;
          write_pack<N>(writes ? de - r * in.e_step_stride + column : nullptr, [&](int j) {
            T& state = carried.at(n, column, j);
            const T gradient = state + g.at(r, n, column, j);
            state = (T(1) - share[r]) * gradient;
            du.at(n, column, j) += ds[r] * e.at(r, n, column, j);
            return share[r] * gradient + ds[r] * u.at(0, n, column, j);
          });
        }
      });
    }
    if (alone) k = k_at;
  };

  load_round(0);
  for (int i = 0; i < p.rounds + (alone ? 0 : 2); ++i) {
    if (!alone && i >= 2) write(i - 2);
    // The rows of this round have arrived, and the slot of the next round is no longer read.
    copy_async_wait();
    block_barrier();
    load_round(i + 1);
    if (i < p.rounds) summarise(i);
    if (alone) {
      write(i);
    } else if (i >= 1 && i <= p.rounds) {
      scan(i - 1);
    }
  }

  if (group.exists && p.partial_du != nullptr) du.end(columns, p.partial_du + group.index * D);
  if (alone) {
    if (group.exists && call.dc0 != nullptr) carried.end(columns, call.dc0 + b * D);
    Held<S, N> c0;
    begin_state(c0, 0, nullptr);
    const T with_c0 = with(carried, c0);
    if (group.exists && call.dl0 != nullptr && columns.rank == 0) call.dl0[b] = with_c0 - k;
    return;
  }
  if (scans && call.dc0 != nullptr) call.dc0[b * D + column] = g_after;
  if (call.dl0 == nullptr) return;
  T with_c0[1] = {scans && call.c0 != nullptr ? g_after * call.c0[b * D + column] : T(0)};
  sum(with_c0);
  if (group.exists && columns.rank == 0) p.with_c0[group.index] = with_c0[0];
  group.raise(p.scanned, p.rounds + 1);
  group.await_all(p.scanned, p.rounds + 1);
  if (!group.exists || group.rank != 0 || columns.rank != 0) return;
  T dl0 = -k;
  for (int n = 0; n < group.groups; ++n) dl0 += p.with_c0[group.first + n];
  call.dl0[b] = dl0;
}

}  // namespace

template <typename S>
int prefix_pool_gradient_rounds(const PrefixPoolBackwardParams<S>& call, const PoolPlan& plan, void* stream) {
  using T = Compute<S>;
  const PoolInput<S>& in = call.in;
  const int64_t all_groups = in.batch * plan.round_groups, positions = plan.round_groups * plan.chunk;
  GradientRoundsParams<S> p = {};
  p.call = call;
  p.plan = plan;
  p.layout = gradient_rounds_layout(plan, in.dim, sizeof(S), sizeof(T));
  p.slots = gradient_slots(plan.round_groups);
  p.rounds = static_cast<int>((in.steps + positions - 1) / positions);
  p.partial_du = call.du == nullptr ? nullptr : call.workspace;
  if (plan.round_groups > 1) {
    p.g = call.workspace + all_groups * in.dim;
    p.k = p.g + kRoundSlots * all_groups * in.dim;
    p.k_after = p.k + kRoundSlots * all_groups;
    p.through = p.k_after + kRoundSlots * all_groups;
    p.with_c0 = p.through + kRoundSlots * all_groups;
    p.summed = reinterpret_cast<uint32_t*>(p.with_c0 + all_groups);
    p.scanned = p.summed + all_groups;
    const int error = zero(p.summed, static_cast<size_t>(2 * all_groups) * sizeof(uint32_t), stream);
    if (error != 0) return error;
  }
  const auto run = [&](auto packs) {
    return launch_rounds(prefix_gradient_rounds<S, packs()>, p, plan, p.layout, in.batch, stream);
  };
  const int error = plan.packs == 1 ? run(std::integral_constant<int, 1>{}) : run(std::integral_constant<int, 2>{});
  if (error != 0 || call.du == nullptr) return error;
  return reduce_partial_sums(PartialSums<S>{1, all_groups, in.dim, p.partial_du, nullptr, call.du, nullptr, nullptr},
                             stream);
}

#define FOR(S) template int prefix_pool_gradient_rounds(const PrefixPoolBackwardParams<S>&, const PoolPlan&, void*);
FOR(float)
FOR(double)
FOR(BFloat16)
FOR(Float16)
#undef FOR

}  // namespace cuda
}  // namespace llm_ext
