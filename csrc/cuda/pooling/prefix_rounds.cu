// The prefix form forward in one pass, for few and long rows: e is read once and c written once.
//
// All blocks run at the same time. Several teams share a row of the batch, and go through its time in rounds, each a
// chunk in every round, one behind the other. A chunk stays in shared memory from the time it is read until its states
// are written, two rounds later, while others come and go:
//
// round i      its rows have come; scores, and what they add up to, the summary, which goes to the workspace with a
// flag round i + 1  each team has some of the columns, and goes through the summaries of all teams in the order of
// time: they
//              become the states before each chunk; another flag
// round i + 2  from the state before it the team writes the states of its chunk
//
// So flags have a round's time to arrive in.
#include "cuda/device.cuh"
#include "cuda/pooling/pool.cuh"

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
  Compute<S>* summaries;  // [kSlots, B teams, D]
  Compute<S>* l;          // [kSlots, B teams] log-sum-exp of each chunk
  Compute<S>* l_before;   // [kSlots, B teams]
  uint32_t* summed;       // [B teams] flags: rounds of which the summary is there
  uint32_t* scanned;      // [B teams] rounds of which the columns of that team are there
};

template <typename S, int N>
LLM_EXT_KERNEL(kPoolThreads)
void prefix_rounds(LLM_EXT_PARAMS RoundsParams<S> p) {
  using T = Compute<S>;
  constexpr int R = kForwardRows<N>;
  const PrefixPoolForwardParams<S>& call = p.call;
  const PoolInput<S>& in = call.in;
  const int teams = p.plan.teams, chunk = static_cast<int>(p.plan.chunk);
  const int in_block = thread_index() / p.plan.team;
  const int64_t number = static_cast<int64_t>(block_x()) * (kPoolThreads / p.plan.team) + in_block;
  const int64_t units = in.batch * teams;
  const bool exists = number < units;
  const int64_t b = exists ? number / teams : 0, first_of_row = b * teams;
  const int mine = static_cast<int>(number % teams);
  const Columns<S, N> columns(in.dim, p.plan);
  TeamSum<T> sum = team_sum<T>(p.plan.team);
  // This team's rows and scores.
  unsigned char* own = shared_memory() + p.layout.sums + in_block * p.layout.team;
  S* rows = reinterpret_cast<S*>(own);
  T* scores = reinterpret_cast<T*>(own + p.layout.rows);

  const auto begin_of = [&](int i) { return (static_cast<int64_t>(i) * teams + mine) * chunk; };
  const auto count_of = [&](int i) {
    const int64_t left = exists ? in.steps - begin_of(i) : 0;
    return static_cast<int>(left < 0 ? 0 : (left < chunk ? left : chunk));
  };
  const auto row_at = [&](int i, int r) { return rows + static_cast<int64_t>(i % kSlots * chunk + r) * in.dim; };
  const auto scores_at = [&](int i) { return scores + i % kSlots * chunk; };
  // A thread copies the columns that it will read.
  const auto ask_for = [&](int i) {
    if (i >= p.rounds) return;
    const int64_t begin = begin_of(i);
    const Admission<S> admission(in, b, begin, begin + count_of(i));
    const S* from = in.e + b * in.e_batch_stride + begin * in.e_step_stride;
    for (int r = 0; r < chunk; ++r) {
      if (!admission.admits(r)) continue;
      columns.for_each([&](int, int64_t column) {
        if (column < in.dim) copy_async(row_at(i, r) + column, from + r * in.e_step_stride + column);
      });
    }
  };
  // All teams of the row have come so far; the block meets.
  const auto await_all = [&](const uint32_t* flags, int rounds) {
    for (int k = columns.rank; exists && k < teams; k += columns.team) await_flag(flags + first_of_row + k, rounds);
    block_barrier();
  };
  const auto raise = [&](uint32_t* flags, int rounds) {
    block_barrier();
    if (exists && columns.rank == 0) raise_flag(flags + number, rounds);
  };

  Tile<S, N, 1> u;
  u.load(columns, [&](int) { return in.u; });

  const auto summarise = [&](int i) {
    const int64_t begin = begin_of(i);
    const int count = count_of(i);
    const Admission<S> admission(in, b, begin, begin + count);
    Pooled<S, N> pooled;
    pooled.begin(columns, nullptr);
    for (int r0 = 0; r0 < chunk; r0 += R) {
      Tile<S, N, R> e;
      e.load(columns, [&](int r) { return admission.admits(r0 + r) ? row_at(i, r0 + r) : nullptr; });
      T tile[R];
      score(in, columns, e, u, in.scores + b * in.steps + begin + r0, sum, tile);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (columns.writes(r) && r0 + r < chunk) scores_at(i)[r0 + r] = tile[r];
      }
      pooled.add(columns, e, tile);
    }
    const T l = pooled.end(columns);
    if (exists) {
      const int64_t place = i % kSlots * units + number;
      if (columns.rank == 0) p.l[place] = l;
      pooled.c.end(columns, p.summaries + place * in.dim);
    }
    raise(p.summed, i + 1);
  };

  // This team's columns of the states before each chunk of the row; a thread has one.
  const int width = static_cast<int>((in.dim + teams - 1) / teams);
  const int64_t column = static_cast<int64_t>(mine) * width + columns.rank;
  const bool scans = exists && columns.rank < width && column < in.dim;
  T l = call.l0 == nullptr || !exists ? -kInfinity<T> : call.l0[b];
  T c = call.c0 == nullptr || !scans ? T(0) : call.c0[b * in.dim + column];
  const auto scan = [&](int i) {
    constexpr int kAhead = 8;
    await_all(p.summed, i + 1);
    const int64_t first = i % kSlots * units + first_of_row;
    for (int k0 = 0; exists && k0 < teams; k0 += kAhead) {
      T of_l[kAhead], of_c[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        of_l[k] = k0 + k < teams ? p.l[first + k0 + k] : -kInfinity<T>;
        of_c[k] = k0 + k < teams && scans ? p.summaries[(first + k0 + k) * in.dim + column] : T(0);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (k0 + k >= teams) continue;
        if (scans) p.summaries[(first + k0 + k) * in.dim + column] = c;
        if (mine == 0 && columns.rank == 0) p.l_before[first + k0 + k] = l;
        const T score_of[1] = {of_l[k]};
        T keep[1], share[1];
        prefix_shares(score_of, l, keep, share);
        c = keep[0] * c + share[0] * of_c[k];
      }
    }
    raise(p.scanned, i + 1);
  };

  const auto write = [&](int i) {
    await_all(p.scanned, i + 1);
    const int64_t begin = begin_of(i), place = i % kSlots * units + number;
    const int count = count_of(i);
    if (count == 0) return;
    Held<S, N> state;
    state.begin(columns, nullptr, p.summaries + place * in.dim);
    T level = p.l_before[place];
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

  ask_for(0);
  for (int i = 0; i < p.rounds + 2; ++i) {
    if (i >= 2) write(i - 2);
    // The rows of this round are here, and nobody reads those that the next ones take the place of.
    copy_async_wait();
    block_barrier();
    ask_for(i + 1);
    if (i < p.rounds) summarise(i);
    if (i >= 1 && i <= p.rounds) scan(i - 1);
  }
  if (mine == 0 && exists && columns.rank == 0) call.l_n[b] = l;
  if (scans) call.c_n[b * in.dim + column] = c;
}

}  // namespace

template <typename S>
int prefix_pool_rounds(const PrefixPoolForwardParams<S>& call, const PoolPlan& plan, void* stream) {
  using T = Compute<S>;
  const PoolInput<S>& in = call.in;
  const int64_t units = in.batch * plan.teams, flags = 2 * units;
  RoundsParams<S> p = {};
  p.call = call;
  p.plan = plan;
  p.layout = rounds_layout(plan, in.dim, sizeof(S), sizeof(T));
  p.rounds = static_cast<int>((in.steps + plan.teams * plan.chunk - 1) / (plan.teams * plan.chunk));
  p.summaries = call.workspace;
  p.l = p.summaries + kSlots * units * in.dim;
  p.l_before = p.l + kSlots * units;
  p.summed = reinterpret_cast<uint32_t*>(p.l_before + kSlots * units);
  p.scanned = p.summed + units;
  const int error = zero(p.summed, static_cast<size_t>(flags) * sizeof(uint32_t), stream);
  if (error != 0) return error;
  LaunchShape shape;
  shape.grid_x = static_cast<unsigned>((units + kPoolThreads / plan.team - 1) / (kPoolThreads / plan.team));
  shape.threads = kPoolThreads;
  shape.shared_bytes = static_cast<size_t>(p.layout.sums + kPoolThreads / plan.team * p.layout.team);
  shape.all_resident = true;
  return with_held_packs(plan, [&](auto packs) { return launch(prefix_rounds<S, packs()>, shape, p, stream); });
}

template int prefix_pool_rounds(const PrefixPoolForwardParams<float>&, const PoolPlan&, void*);
template int prefix_pool_rounds(const PrefixPoolForwardParams<double>&, const PoolPlan&, void*);
template int prefix_pool_rounds(const PrefixPoolForwardParams<BFloat16>&, const PoolPlan&, void*);
template int prefix_pool_rounds(const PrefixPoolForwardParams<Float16>&, const PoolPlan&, void*);

}  // namespace cuda
}  // namespace llm_ext
