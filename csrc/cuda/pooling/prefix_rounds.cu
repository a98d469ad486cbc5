// The prefix form of attention pooling, forward, in one pass for few and long rows: e is read once and c written once.
//
// All blocks are resident. The thread groups of a batch row process adjacent chunks of time, one chunk each per round.
// A chunk stays in shared memory from its load until its states are written two rounds later:
//
// round i      the chunk has arrived; compute scores and the summary, store the summary in the workspace, raise a flag
// round i + 1  scan: each thread group owns some columns and replaces the summaries of all groups, in the order of
//              time, by the states before each chunk; raise another flag
// round i + 2  write the states of the chunk from the state before it
//
// So flags have one round to arrive.
#include "cuda/device.cuh"
#include "cuda/pooling/columns.cuh"
#include "cuda/pooling/rounds.cuh"

namespace llm_ext {
namespace cuda {
namespace {

constexpr int kSlots = kRoundSlots;

template <typename S>
struct RoundsParams {
  PrefixPoolForwardParams<S> call;
  PoolPlan plan;
  RoundsLayout layout;
  int rounds;
  Compute<S>* summaries;         // [kSlots, B groups, D], groups per batch row
  LogSum<Compute<S>>* l;         // [kSlots, B groups] log-sum-exp of each chunk
  LogSum<Compute<S>>* l_before;  // [kSlots, B groups]
  uint32_t* summed;              // [B groups] flags: rounds whose summary is stored
  uint32_t* scanned;             // [B groups] flags: rounds whose columns are scanned
};

template <typename S, int N>
LLM_EXT_KERNEL(kPoolThreads)
void prefix_rounds(LLM_EXT_PARAMS RoundsParams<S> p) {
  using T = Compute<S>;
  constexpr int R = kForwardRows<N>;
  const PrefixPoolForwardParams<S>& call = p.call;
  const PoolInput<S>& in = call.in;
  const int chunk = static_cast<int>(p.plan.chunk);
  const RoundGroup group(p.plan, in.batch);
  const int groups = group.groups;
  const int64_t all_groups = in.batch * groups, b = group.b;
  const bool exists = group.exists;
  const Columns<S, N> columns(in.dim, p.plan);
  GroupSum<T> sum = group_sum<T>(p.plan.group_threads);
  // The thread group's rows and scores.
  unsigned char* own = shared_memory() + p.layout.sums + group.in_block * p.layout.group;
  S* rows = reinterpret_cast<S*>(own);
  T* scores = reinterpret_cast<T*>(own + p.layout.rows);

  const auto begin_of = [&](int i) { return (static_cast<int64_t>(i) * groups + group.rank) * chunk; };
  const auto count_of = [&](int i) {
    const int64_t left = exists ? in.steps - begin_of(i) : 0;
    return static_cast<int>(left < 0 ? 0 : (left < chunk ? left : chunk));
  };
  const auto row_at = [&](int i, int r) { return rows + static_cast<int64_t>(i % kSlots * chunk + r) * in.dim; };
  const auto scores_at = [&](int i) { return scores + i % kSlots * chunk; };
  // Each thread copies the columns that it will read.
  const auto load_round = [&](int i) {
    if (i >= p.rounds) return;
    const int64_t begin = begin_of(i);
    const AttendedPositions<S> attended(in, b, begin, begin + count_of(i));
    const S* from = in.e + b * in.e_batch_stride + begin * in.e_step_stride;
    for (int r = 0; r < chunk; ++r) {
      if (!attended.attends(r)) continue;
      columns.for_each([&](int, int64_t column) {
        if (column < in.dim) copy_async(row_at(i, r) + column, from + r * in.e_step_stride + column);
      });
    }
  };
  Tile<S, N, 1> u;
  u.load(columns, [&](int) { return in.u; });

  const auto summarise = [&](int i) {
    const int64_t begin = begin_of(i);
    const int count = count_of(i);
    const AttendedPositions<S> attended(in, b, begin, begin + count);
    Pooled<S, N> pooled;
    pooled.begin(columns, nullptr);
    for (int r0 = 0; r0 < chunk; r0 += R) {
      Tile<S, N, R> e;
      e.load(columns, [&](int r) { return attended.attends(r0 + r) ? row_at(i, r0 + r) : nullptr; });
      T tile[R];
      score(in, columns, e, u, in.scores + b * in.steps + begin + r0, sum, tile);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (columns.writes(r) && r0 + r < chunk) scores_at(i)[r0 + r] = tile[r];
      }
      pooled.add(columns, e, tile);
    }
    const LogSum<T> l = pooled.end(columns);
    if (exists) {
      const int64_t slot = i % kSlots * all_groups + group.index;
      if (columns.rank == 0) p.l[slot] = l;
      pooled.c.end(columns, p.summaries + slot * in.dim);
    }
    group.raise(p.summed, i + 1);
  };

  // The columns of the scan that this thread group owns, one per thread.
  const int width = static_cast<int>((in.dim + groups - 1) / groups);
  const int64_t column = static_cast<int64_t>(group.rank) * width + columns.rank;
  const bool scans = exists && columns.rank < width && column < in.dim;
  LogSum<T> l = call.l0 == nullptr || !exists ? no_scores<T>() : given_log_sum(call.l0[b]);
  T c = call.c0 == nullptr || !scans ? T(0) : call.c0[b * in.dim + column];
  const auto scan = [&](int i) {
    constexpr int kAhead = 8;
    group.await_all(p.summed, i + 1);
    const int64_t first = i % kSlots * all_groups + group.first;
    for (int k0 = 0; exists && k0 < groups; k0 += kAhead) {
      LogSum<T> of_l[kAhead];
      T of_c[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        of_l[k] = k0 + k < groups ? p.l[first + k0 + k] : no_scores<T>();
        of_c[k] = k0 + k < groups && scans ? p.summaries[(first + k0 + k) * in.dim + column] : T(0);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (k0 + k >= groups) continue;
        if (scans) p.summaries[(first + k0 + k) * in.dim + column] = c;
        if (group.rank == 0 && columns.rank == 0) p.l_before[first + k0 + k] = l;
        T keep, share;
        add_scores(l, of_l[k], keep, share);
        c = keep * c + share * of_c[k];
      }
    }
    group.raise(p.scanned, i + 1);
  };

  const auto write = [&](int i) {
    group.await_all(p.scanned, i + 1);
    const int64_t begin = begin_of(i), slot = i % kSlots * all_groups + group.index;
    const int count = count_of(i);
    if (count == 0) return;
    Held<S, N> state;
    state.begin(columns, nullptr, p.summaries + slot * in.dim);
    LogSum<T> level = p.l_before[slot];
    S* to = call.c + b * in.e_batch_stride + begin * in.e_step_stride;
    for (int r0 = 0; r0 < count; r0 += R) {
      T tile[R], keep[R], share[R];
#pragma unroll
      for (int r = 0; r < R; ++r) tile[r] = r0 + r < count ? scores_at(i)[r0 + r] : -kInfinity<T>;
      Tile<S, N, R> e;
      e.load(columns, [&](int r) { return tile[r] == -kInfinity<T> ? nullptr : row_at(i, r0 + r); });
      prefix_shares(tile, level, keep, share);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (columns.writes(r) && r0 + r < count) call.share[b * in.steps + begin + r0 + r] = share[r];
      }
      write_states(columns, state, e, keep, share, to + r0 * in.e_step_stride, in.e_step_stride, count - r0);
    }
  };

  load_round(0);
  for (int i = 0; i < p.rounds + 2; ++i) {
    if (i >= 2) write(i - 2);
    // The rows of this round have arrived, and the slot of the next round is no longer read.
    copy_async_wait();
    block_barrier();
    load_round(i + 1);
    if (i < p.rounds) summarise(i);
    if (i >= 1 && i <= p.rounds) scan(i - 1);
  }
  if (group.rank == 0 && exists && columns.rank == 0) call.l_n[b] = l;
  if (scans) call.c_n[b * in.dim + column] = c;
}

}  // namespace

template <typename S>
int prefix_pool_rounds(const PrefixPoolForwardParams<S>& call, const PoolPlan& plan, void* stream) {
  using T = Compute<S>;
  const PoolInput<S>& in = call.in;
  const int64_t all_groups = in.batch * plan.round_groups, flags = 2 * all_groups;
  RoundsParams<S> p = {};
  p.call = call;
  p.plan = plan;
  p.layout = rounds_layout(plan, in.dim, sizeof(S), sizeof(T));
  p.rounds = static_cast<int>((in.steps + plan.round_groups * plan.chunk - 1) / (plan.round_groups * plan.chunk));
  p.summaries = call.workspace;
  p.l = reinterpret_cast<LogSum<T>*>(p.summaries + kSlots * all_groups * in.dim);
  p.l_before = p.l + kSlots * all_groups;
  p.summed = reinterpret_cast<uint32_t*>(p.l_before + kSlots * all_groups);
  p.scanned = p.summed + all_groups;
  const int error = zero(p.summed, static_cast<size_t>(flags) * sizeof(uint32_t), stream);
  if (error != 0) return error;
  return with_held_packs(
      plan, [&](auto packs) { return launch_rounds(prefix_rounds<S, packs()>, p, plan, p.layout, in.batch, stream); });
}

template int prefix_pool_rounds(const PrefixPoolForwardParams<float>&, const PoolPlan&, void*);
template int prefix_pool_rounds(const PrefixPoolForwardParams<double>&, const PoolPlan&, void*);
template int prefix_pool_rounds(const PrefixPoolForwardParams<BFloat16>&, const PoolPlan&, void*);
template int prefix_pool_rounds(const PrefixPoolForwardParams<Float16>&, const PoolPlan&, void*);

}  // namespace cuda
}  // namespace llm_ext
