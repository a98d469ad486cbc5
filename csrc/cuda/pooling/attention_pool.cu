// Attention pooling and its causal prefix form. docs/attention.md derives the formulas, docs/cuda.md counts the bytes.
//
// A team of threads owns a chunk of time of one row of the batch, and each of its threads some columns: it holds their
// sums or their state through the whole chunk, and of what is read a tile of positions at a time. Only dot products
// over all columns are shared, once a tile; while they are, the next tile is on its way. Teams exchange nothing: what a
// chunk adds up to goes to the workspace, and a small kernel merges it in the order of time.
//
// Rows of whole packs of 16 bytes, 1024 of them at most, are held in registers. All others go one number at a time, and
// what is held of them lies in the workspace.
#include <type_traits>

#include "cuda/attention/launchers.h"
#include "cuda/device.cuh"
#include "cuda/reduce_partial_sums.h"
#include "cuda/pooling/pool.cuh"

namespace llm_ext {
namespace cuda {
namespace {

constexpr int kThreads = kPoolThreads;

struct Unit {
  int64_t number;      // of the chunk, among those of all rows
  int64_t b;           // its row of the batch
  int64_t begin, end;  // its positions; none if there is no such chunk
  bool exists;
};

// The chunk of this thread's team. Where a kernel reads what another has just read, it begins with what came last,
// which the second-level cache may still hold.
LLM_EXT_DEVICE Unit unit_of(const PoolPlan& plan, int64_t batch, int64_t steps, bool last_first) {
  const int64_t units = batch * plan.chunks;
  const int64_t place = static_cast<int64_t>(block_x()) * (kThreads / plan.team) + thread_index() / plan.team;
  Unit unit = {};
  unit.exists = place < units;
  if (!unit.exists) return unit;
  unit.number = last_first ? units - 1 - place : place;
  unit.b = unit.number / plan.chunks;
  unit.begin = unit.number % plan.chunks * plan.chunk;
  unit.end = unit.begin + plan.chunk < steps ? unit.begin + plan.chunk : steps;
  return unit;
}

// ---- the pooled vector of a chunk: all of pooling, and what a chunk of the prefix form leaves to those after it

template <typename S>
struct SummaryParams {
  PoolInput<S> in;
  PoolPlan plan;
  S* c;                    // [B, D] out, where a chunk is a whole row; null: it goes to the next one
  Compute<S>* partial_c;   // [units, D] out
  Compute<S>* l;           // [units] out: log-sum-exp
  Compute<S>* scores_out;  // [B, T] out; null: not wanted
};

template <typename S, int N>
LLM_EXT_SHARING_KERNEL(kThreads, kBlocks<N>)
void pool_summaries(LLM_EXT_PARAMS SummaryParams<S> p) {
  using T = Compute<S>;
  constexpr int R = kForwardRows<N>;
  const PoolInput<S>& in = p.in;
  const Unit unit = unit_of(p.plan, in.batch, in.steps, false);
  const Columns<S, N> columns(in.dim, p.plan);
  const Admission<S> admission(in, unit.b, unit.begin, unit.end);
  const int count = static_cast<int>(unit.end - unit.begin);
  const int64_t place = unit.b * in.steps + unit.begin;  // of its first position
  TeamSum<T> sum = team_sum<T>(p.plan.team);
  const S* rows = in.e + offset_of(in, unit.b, unit.begin);
  const auto load = [&](Tile<S, N, R>& tile, int i) {
    tile.load(columns, [&](int r) { return admission.admits(i + r) ? rows + (i + r) * in.e_step_stride : nullptr; });
  };

  Tile<S, N, 1> u;
  u.load(columns, [&](int) { return in.u; });
  Pooled<S, N> pooled;
  pooled.begin(columns, p.partial_c + unit.number * in.dim);
  Tile<S, N, R> e;
  load(e, 0);
  for (int i = 0; i < static_cast<int>(p.plan.chunk); i += R) {
    Tile<S, N, R> next;
    load(next, i + R);
    T weights[R];
    score(in, columns, e, u, in.scores + place + i, sum, weights);
    if (p.scores_out != nullptr) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (columns.writes(r) && i + r < count) p.scores_out[place + i + r] = weights[r];
      }
    }
    pooled.add(columns, e, weights);
    e = next;
  }
  if (!unit.exists) return;
  const T l = pooled.end(columns);
  if (columns.rank == 0) p.l[unit.number] = l;
  if (p.c != nullptr) {
    write_row(columns, p.c + unit.number * in.dim,
              [&](int i, int64_t column, int j) { return pooled.c.at(i, column, j); });
  } else {
    pooled.c.end(columns, p.partial_c + unit.number * in.dim);
  }
}

// ---- pooling, backward

template <typename S>
struct PoolGradientParams {
  PoolBackwardParams<S> call;
  PoolPlan plan;
  Compute<S>* partial_du;  // [units, D] out; null: not wanted
};

template <typename S, int N>
LLM_EXT_SHARING_KERNEL(kThreads, kBlocks<N>)
void pool_gradients(LLM_EXT_PARAMS PoolGradientParams<S> p) {
  using T = Compute<S>;
  constexpr int R = kBackwardRows<N>;
  const PoolInput<S>& in = p.call.in;
  const Unit unit = unit_of(p.plan, in.batch, in.steps, false);
  const Columns<S, N> columns(in.dim, p.plan);
  const Admission<S> admission(in, unit.b, unit.begin, unit.end);
  const int count = static_cast<int>(unit.end - unit.begin);
  const int64_t place = unit.b * in.steps + unit.begin;  // of its first position
  TeamSum<T> sum = team_sum<T>(p.plan.team);
  const T lse = p.call.lse[unit.b];
  const S* rows = in.e + offset_of(in, unit.b, unit.begin);
  const auto load = [&](Tile<S, N, R>& tile, int i) {
    tile.load(columns, [&](int r) {
      return admission.admits(i + r) && lse != -kInfinity<T> ? rows + (i + r) * in.e_step_stride : nullptr;
    });
  };

  Tile<S, N, 1> u, g;
  u.load(columns, [&](int) { return in.u; });
  g.load(columns, [&](int) { return p.call.grad_c == nullptr ? nullptr : p.call.grad_c + unit.b * in.dim; });
  Held<S, N> du;
  const bool wants_du = p.partial_du != nullptr && unit.exists;
  if (wants_du || N > 0) du.begin(columns, N > 0 ? nullptr : p.partial_du + unit.number * in.dim, nullptr);
  // Of every ds: the gradient of the log-sum-exp, and that of c along c.
  T along[1] = {T(0)};
  const auto load_c = [&] {
    Tile<S, N, 1> c;
    c.load(columns, [&](int) { return p.call.c + unit.b * in.dim; });
    return c;
  };
  {
    const Tile<S, N, 1> c = load_c();
    columns.for_each_number(
        [&](int i, int64_t column, int j) { along[0] += g.at(0, i, column, j) * c.at(0, i, column, j); });
    sum(along);
  }
  const T of_lse = p.call.grad_lse == nullptr ? T(0) : p.call.grad_lse[unit.b];
  T excess = T(0);  // sum of alpha (g . e - g . c), 0 over a whole row but for the rounding of c

  S* de = p.call.de == nullptr ? nullptr : p.call.de + offset_of(in, unit.b, unit.begin);
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
      if (e.present(r)) s = in.u != nullptr ? sums[r] : widen(in.scores[place + i + r]);
      alpha[r] = e.present(r) ? share_of(s - lse) : T(0);
      const T slope = e.present(r) ? alpha[r] * (sums[R + r] - along[0]) : T(0);
      excess += slope;
      ds[r] = e.present(r) ? slope + alpha[r] * of_lse : T(0);
      if (i + r >= count) continue;
      if (p.call.dscores != nullptr && columns.writes(r)) {
        p.call.dscores[place + i + r] = narrow<S>(ds[r]);
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
    // c was rounded, and with it g . c, by the same error in all ds: in the sum du it would add up to that times c.
    const Tile<S, N, 1> c = load_c();
    columns.for_each_number([&](int n, int64_t column, int j) {
      if (column < in.dim) du.at(n, column, j) -= excess * c.at(0, n, column, j);
    });
  }
  du.end(columns, p.partial_du + unit.number * in.dim);
}

// ---- the prefix form, forward: c_t = keep_t c_{t-1} + share_t e_t

template <typename S>
struct PrefixParams {
  PrefixPoolForwardParams<S> call;
  PoolPlan plan;
  const Compute<S>* scores;  // [B, T] as pool_summaries leaves them; null: a chunk is a whole row, and nothing is known
  const Compute<S>* l_before;  // [units] log-sum-exp before each chunk; null: -inf
  Compute<S>* c_before;        // [units, D] the state; changed where it is not held; null: zeros
};

template <typename S, int N>
LLM_EXT_SHARING_KERNEL(kThreads, kBlocks<N>)
void prefix_states(LLM_EXT_PARAMS PrefixParams<S> p) {
  using T = Compute<S>;
  constexpr int R = kForwardRows<N>;
  const PoolInput<S>& in = p.call.in;
  const Unit unit = unit_of(p.plan, in.batch, in.steps, true);
  const Columns<S, N> columns(in.dim, p.plan);
  const Admission<S> admission(in, unit.b, unit.begin, unit.end);
  const int count = static_cast<int>(unit.end - unit.begin);
  const int64_t place = unit.b * in.steps + unit.begin;  // of its first position
  TeamSum<T> sum = team_sum<T>(p.plan.team);
  const S* rows = in.e + offset_of(in, unit.b, unit.begin);
  const auto load = [&](Tile<S, N, R>& tile, int i) {
    tile.load(columns, [&](int r) { return admission.admits(i + r) ? rows + (i + r) * in.e_step_stride : nullptr; });
  };

  Tile<S, N, 1> u;
  u.load(columns, [&](int) { return p.scores == nullptr ? in.u : nullptr; });
  T l = p.l_before == nullptr ? -kInfinity<T> : p.l_before[unit.number];
  Held<S, N> c;
  T* c_before = p.c_before == nullptr ? nullptr : p.c_before + unit.number * in.dim;
  if (unit.exists || N > 0) c.begin(columns, c_before, c_before);
  S* c_rows = p.call.c + offset_of(in, unit.b, unit.begin);
  Tile<S, N, R> e;
  load(e, 0);
  for (int i = 0; i < static_cast<int>(p.plan.chunk); i += R) {
    Tile<S, N, R> next;
    load(next, i + R);
    T scores[R], keep[R], share[R];
    if (p.scores == nullptr) {
      score(in, columns, e, u, in.scores + place + i, sum, scores);
    } else {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        scores[r] = e.present(r) ? p.scores[place + i + r] : -kInfinity<T>;
      }
    }
    prefix_shares(scores, l, keep, share);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (columns.writes(r) && i + r < count) p.call.share[place + i + r] = share[r];
    }
    write_states(columns, c, e, keep, share, c_rows + i * in.e_step_stride, in.e_step_stride, count - i);
    e = next;
  }
  if (!unit.exists || p.scores != nullptr) return;
  if (columns.rank == 0) p.call.l_n[unit.b] = l;
  c.end(columns, p.call.c_n + unit.b * in.dim);
}

// What was before each chunk from what each leaves, in place, and after the last one.
template <typename S>
struct ScanParams {
  int64_t slabs, chunks, dim;  // slabs: blocks that share the columns of a row
  const Compute<S>* l;         // [B, chunks]
  Compute<S>* l_before;        // [B, chunks] out
  Compute<S>* c;               // [B, chunks, D] in and out
  const Compute<S>* l0;        // [B]; null: -inf
  const Compute<S>* c0;        // [B, D]; null exactly where l0 is: zeros
  Compute<S>* l_n;             // [B] out
  Compute<S>* c_n;             // [B, D] out
};

// A thread owns a column of a row of the batch; what it reads does not wait for what it adds up.
template <typename S>
LLM_EXT_SHARING_KERNEL(kThreads, 2)
void prefix_scan(LLM_EXT_PARAMS ScanParams<S> p) {
  using T = Compute<S>;
  constexpr int kAhead = 16;
  const int64_t b = block_x() / p.slabs, column = block_x() % p.slabs * kThreads + thread_index();
  if (column >= p.dim && column > 0) return;
  const bool owns = column < p.dim;
  T l = p.l0 == nullptr ? -kInfinity<T> : p.l0[b];
  T c = p.c0 == nullptr || !owns ? T(0) : p.c0[b * p.dim + column];
  for (int64_t first = b * p.chunks; first < (b + 1) * p.chunks; first += kAhead) {
    T of_l[kAhead], of_c[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const bool there = first + i < (b + 1) * p.chunks;
      of_l[i] = there ? p.l[first + i] : -kInfinity<T>;
      of_c[i] = there && owns ? p.c[(first + i) * p.dim + column] : T(0);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= (b + 1) * p.chunks) continue;
      if (column == 0) p.l_before[first + i] = l;
      if (owns) p.c[(first + i) * p.dim + column] = c;
      const T score[1] = {of_l[i]};
      T keep[1], share[1];
      prefix_shares(score, l, keep, share);
      c = keep[0] * c + share[0] * of_c[i];
    }
  }
  if (column == 0) p.l_n[b] = l;
  if (owns) p.c_n[b * p.dim + column] = c;
}

// ---- the prefix form, backward, from the last position to the first: G_t = g_t + keep_{t+1} G_{t+1}, and K_t likewise
// from the dot products g_t . c_t
//
// A chunk does not know the state C before it, but c_t = l_t + p_t C, where l is what the state would be from zero, and
// p the product of all keep up to t. So g_t . c_t = g_t . l_t + p_t g_t . C, and what the chunk hands on of K, the sum
// of p_t g_t . c_t, is that of p_t g_t . l_t, and C times the sum of p_t^2 g_t.

template <typename S>
struct PrefixGradientParams {
  PrefixPoolBackwardParams<S> call;
  PoolPlan plan;
  Compute<S>* products;    // [B, T] g . l
  Compute<S>* passed;      // [B, T] p
  Compute<S>* g;           // [units, D] what a chunk hands to what is before it, then what comes to it from after it
  Compute<S>* crossed;     // [units, D] sum of p^2 g
  Compute<S>* states;      // [units, D] l at the end of a chunk, then C
  Compute<S>* k;           // [units] what it hands on, but for the part of C
  Compute<S>* k_after;     // [units] what comes to it
  Compute<S>* through;     // [units] p at its end: the share that what comes to it has in what it hands on
  Compute<S>* partial_du;  // [units, D] out, in the place of `crossed`; null: not wanted
};

// The other way round than the kernel after the next: that one may find g and e in the cache.
template <typename S, int N>
LLM_EXT_SHARING_KERNEL(kThreads, kBlocks<N>)
void prefix_gradient_summaries(LLM_EXT_PARAMS PrefixGradientParams<S> p) {
  using T = Compute<S>;
  constexpr int R = kBackwardRows<N>;
  const PrefixPoolBackwardParams<S>& call = p.call;
  const PoolInput<S>& in = call.in;
  const Unit unit = unit_of(p.plan, in.batch, in.steps, false);
  const Columns<S, N> columns(in.dim, p.plan);
  TeamSum<T> sum = team_sum<T>(p.plan.team);
  const int64_t offset = offset_of(in, unit.b, unit.begin);
  const T* shares = call.share + unit.b * in.steps + unit.begin;
  const int count = static_cast<int>(unit.end - unit.begin);
  const auto load = [&](Tile<S, N, R>& g, Tile<S, N, R>& e, int i) {
    g.load(columns, [&](int r) {
      return i + r < count && call.grad_c != nullptr ? call.grad_c + offset + (i + r) * in.e_step_stride : nullptr;
    });
    e.load(columns, [&](int r) {
      return i + r < count && shares[i + r] != T(0) ? in.e + offset + (i + r) * in.e_step_stride : nullptr;
    });
  };

  Held<S, N> handed, crossed, l;
  const int64_t row = unit.number * in.dim, place = unit.b * in.steps + unit.begin;
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
        p.products[place + i + r] = products[r];
        p.passed[place + i + r] = passed[r];
      }
    }
    g = next_g;
    e = next_e;
  }
  if (!unit.exists) return;
  handed.end(columns, p.g + row);
  crossed.end(columns, p.crossed + row);
  l.end(columns, p.states + row);
  if (columns.rank == 0) {
    p.k[unit.number] = k;
    p.through[unit.number] = through;
  }
}

// A block owns a row of the batch.
template <typename S>
LLM_EXT_SHARING_KERNEL(kThreads, 2)
void prefix_gradient_scan(LLM_EXT_PARAMS PrefixGradientParams<S> p) {
  using T = Compute<S>;
  constexpr int kAhead = 16;
  const PrefixPoolBackwardParams<S>& call = p.call;
  const PoolInput<S>& in = call.in;
  const int64_t b = block_x(), D = in.dim, chunks = p.plan.chunks;
  TeamSum<T> sum = team_sum<T>(kThreads);
  const int64_t first = b * chunks;
  // The states before each chunk, and the last one, which has a gradient of its own.
  T along[1] = {T(0)};
  for (int64_t column = thread_index(); column < D; column += kThreads) {
    T c = call.c0 == nullptr ? T(0) : call.c0[b * D + column];
    for (int64_t from = 0; from < chunks; from += kAhead) {
      T l[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) l[i] = from + i < chunks ? p.states[(first + from + i) * D + column] : T(0);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (from + i >= chunks) continue;
        p.states[(first + from + i) * D + column] = c;
        c = l[i] + p.through[first + from + i] * c;
      }
    }
    if (call.grad_c_n != nullptr) along[0] += call.grad_c_n[b * D + column] * c;
  }
  sum(along);
  block_barrier();
  // A warp owns a chunk: what K has of the state before it.
  for (int64_t unit = first + warp_index(); unit < first + chunks; unit += kPoolWarps) {
    T product = T(0);
    for (int64_t column = lane_index(); column < D; column += kWarpThreads) {
      product += p.states[unit * D + column] * p.crossed[unit * D + column];
    }
#pragma unroll
    for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) product += shuffle_xor(product, mask);
    if (lane_index() == 0) p.k[unit] += product;
  }
  block_barrier();
  T k = along[0] - (call.grad_l_n == nullptr ? T(0) : call.grad_l_n[b]);
  for (int64_t unit = first + chunks - 1; unit >= first; --unit) {
    if (thread_index() == 0) p.k_after[unit] = k;
    k = p.k[unit] + p.through[unit] * k;
  }
  along[0] = T(0);
  for (int64_t column = thread_index(); column < D; column += kThreads) {
    T g = call.grad_c_n == nullptr ? T(0) : call.grad_c_n[b * D + column];
    for (int64_t last = chunks - 1; last >= 0; last -= kAhead) {
      T handed[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        handed[i] = last - i >= 0 ? p.g[(first + last - i) * D + column] : T(0);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (last - i < 0) continue;
        const int64_t unit = first + last - i;
        p.g[unit * D + column] = g;
        g = handed[i] + p.through[unit] * g;
      }
    }
    if (call.dc0 != nullptr) call.dc0[b * D + column] = g;
    if (call.c0 != nullptr) along[0] += g * call.c0[b * D + column];
  }
  sum(along);
  if (call.dl0 != nullptr && thread_index() == 0) call.dl0[b] = along[0] - k;
}

template <typename S, int N>
LLM_EXT_SHARING_KERNEL(kThreads, kBlocks<N>)
void prefix_gradients(LLM_EXT_PARAMS PrefixGradientParams<S> p) {
  using T = Compute<S>;
  constexpr int R = kBackwardRows<N>;
  const PrefixPoolBackwardParams<S>& call = p.call;
  const PoolInput<S>& in = call.in;
  const Unit unit = unit_of(p.plan, in.batch, in.steps, true);
  const Columns<S, N> columns(in.dim, p.plan);
  TeamSum<T> sum = team_sum<T>(p.plan.team);
  // Position r of the tile that ends before `end`, the last one first.
  const auto share_at = [&](int64_t t) { return t >= unit.begin ? call.share[unit.b * in.steps + t] : T(0); };
  const auto load_e = [&](Tile<S, N, R>& tile, int64_t end) {
    tile.load(columns, [&](int r) {
      const int64_t t = end - 1 - r;
      return unit.exists && share_at(t) != T(0) ? in.e + offset_of(in, unit.b, t) : nullptr;
    });
  };
  const auto load_g = [&](Tile<S, N, R>& tile, int64_t end) {
    tile.load(columns, [&](int r) {
      const int64_t t = end - 1 - r;
      return unit.exists && call.grad_c != nullptr && t >= unit.begin ? call.grad_c + offset_of(in, unit.b, t)
                                                                      : nullptr;
    });
  };

  // Where there is room in registers, u and the state before the chunk are held, and the next tile asked for ahead.
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
  T* from = p.g + unit.number * in.dim;
  T* c_before = p.states + unit.number * in.dim;
  carried.begin(columns, from, from);
  if constexpr (kHeld == N) before.begin(columns, c_before, c_before);
  const auto before_at = [&](int n, int64_t column, int j) {
    if constexpr (kHeld == N) {
      return before.at(n, column, j);
    } else {
      return column < in.dim ? c_before[column + j] : T(0);
    }
  };
  const bool wants_du = p.partial_du != nullptr && unit.exists;
  if (wants_du || N > 0) du.begin(columns, N > 0 ? nullptr : p.partial_du + unit.number * in.dim, nullptr);
  T k = unit.exists ? p.k_after[unit.number] : T(0);
  Tile<S, N, R> e, g;
  load_e(e, unit.end);
  load_g(g, unit.end);
  for (int64_t i = 0; i < p.plan.chunk; i += R) {
    const int64_t end = unit.end - i;
    [[maybe_unused]] Tile<S, N, R> next_e, next_g;
    if constexpr (kAhead) {
      load_e(next_e, end - R);
      load_g(next_g, end - R);
    }
    // G . e, and g . C.
    T share[R], dots[2 * R] = {};
#pragma unroll
    for (int r = 0; r < R; ++r) share[r] = unit.exists ? share_at(end - 1 - r) : T(0);
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
      if (!unit.exists || t < unit.begin) continue;
      k += p.products[unit.b * in.steps + t] + p.passed[unit.b * in.steps + t] * dots[R + r];
      if (share[r] != T(0)) ds[r] = share[r] * (dots[r] - k);
      k *= T(1) - share[r];
      if (call.dscores != nullptr && columns.writes(r)) {
        call.dscores[unit.b * in.steps + t] = narrow<S>(ds[r]);
      }
    }
    if (unit.exists) {
      columns.for_each([&](int n, int64_t column) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const int64_t t = end - 1 - r;
          Pack<S, columns.kWide> pack;
#pragma unroll
          for (int j = 0; j < columns.kWide; ++j) {
            T& state = carried.at(n, column, j);
            state += g.at(r, n, column, j);
            pack.at[j] = narrow<S>(share[r] * state + ds[r] * u_at(n, column, j));
            state *= T(1) - share[r];
            if (wants_du) du.at(n, column, j) += ds[r] * e.at(r, n, column, j);
          }
          if (call.de != nullptr && column < in.dim && t >= unit.begin) {
            *reinterpret_cast<Pack<S, columns.kWide>*>(call.de + offset_of(in, unit.b, t) + column) = pack;
          }
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
  if (wants_du) du.end(columns, p.partial_du + unit.number * in.dim);
}

// ---- launches

template <typename T, typename Params>
int launch_blocks(void (*kernel)(Params), const Params& params, int64_t blocks, void* stream) {
  if (blocks == 0) return 0;
  LaunchShape shape;
  shape.grid_x = static_cast<unsigned>(blocks);
  shape.threads = kThreads;
  shape.shared_bytes = kSharedBytes<T>;
  return launch(kernel, shape, params, stream);
}

// Enough blocks for a team for each chunk.
template <typename T, typename Params>
int launch_units(void (*kernel)(Params), const Params& params, const PoolPlan& plan, int64_t batch, void* stream) {
  const int64_t teams = kThreads / plan.team;
  return launch_blocks<T>(kernel, params, (batch * plan.chunks + teams - 1) / teams, stream);
}

template <typename S>
int launch_summaries(const SummaryParams<S>& p, void* stream) {
  return with_packs(p.plan, [&](auto packs) {
    return launch_units<Compute<S>>(pool_summaries<S, packs()>, p, p.plan, p.in.batch, stream);
  });
}

}  // namespace

template <typename S>
int pool_forward(const PoolForwardParams<S>& call, const PoolPlan& plan, void* stream) {
  const PoolInput<S>& in = call.in;
  if (plan.whole()) return launch_summaries(SummaryParams<S>{in, plan, call.c, nullptr, call.lse, nullptr}, stream);
  Compute<S>* l = call.workspace + in.batch * plan.chunks * in.dim;
  const int error = launch_summaries(SummaryParams<S>{in, plan, nullptr, call.workspace, l, nullptr}, stream);
  if (error != 0) return error;
  return add_parts(Parts<S>{in.batch, plan.chunks, in.dim, call.workspace, l, call.c, call.lse}, stream);
}

template <typename S>
int pool_backward(const PoolBackwardParams<S>& call, const PoolPlan& plan, void* stream) {
  const PoolInput<S>& in = call.in;
  const PoolGradientParams<S> p = {call, plan, call.du == nullptr ? nullptr : call.workspace};
  const int error = with_packs(plan, [&](auto packs) {
    return launch_units<Compute<S>>(pool_gradients<S, packs()>, p, plan, in.batch, stream);
  });
  if (error != 0 || call.du == nullptr) return error;
  return add_parts(Parts<S>{1, in.batch * plan.chunks, in.dim, p.partial_du, nullptr, call.du, nullptr}, stream);
}

template <typename S>
int prefix_pool_forward(const PrefixPoolForwardParams<S>& call, const PoolPlan& plan, void* stream) {
  using T = Compute<S>;
  const PoolInput<S>& in = call.in;
  if (plan.teams > 0) return prefix_pool_rounds(call, plan, stream);
  PrefixParams<S> p = {call, plan, nullptr, call.l0, const_cast<T*>(call.c0)};
  if (!plan.whole()) {
    const int64_t units = in.batch * plan.chunks;
    T* c = call.workspace;
    T* l = c + units * in.dim;
    T* l_before = l + units;
    T* scores = l_before + units;
    int error = launch_summaries(SummaryParams<S>{in, plan, nullptr, c, l, scores}, stream);
    if (error != 0) return error;
    const int64_t slabs = in.dim > 0 ? (in.dim + kThreads - 1) / kThreads : 1;
    error = launch_blocks<T>(
        prefix_scan<S>, ScanParams<S>{slabs, plan.chunks, in.dim, l, l_before, c, call.l0, call.c0, call.l_n, call.c_n},
        in.batch * slabs, stream);
    if (error != 0) return error;
    p.scores = scores;
    p.l_before = l_before;
    p.c_before = c;
  }
  return with_packs(plan,
                    [&](auto packs) { return launch_units<T>(prefix_states<S, packs()>, p, plan, in.batch, stream); });
}

template <typename S>
int prefix_pool_backward(const PrefixPoolBackwardParams<S>& call, const PoolPlan& plan, void* stream) {
  using T = Compute<S>;
  const PoolInput<S>& in = call.in;
  const int64_t units = in.batch * plan.chunks;
  PrefixGradientParams<S> p = {};
  p.call = call;
  p.plan = plan;
  p.g = call.workspace;
  p.crossed = p.g + units * in.dim;
  p.partial_du = call.du == nullptr ? nullptr : p.crossed;
  p.states = p.crossed + units * in.dim;
  p.k = p.states + units * in.dim;
  p.k_after = p.k + units;
  p.through = p.k_after + units;
  p.products = p.through + units;
  p.passed = p.products + in.batch * in.steps;
  int error = with_packs(plan, [&](auto packs) {
    return launch_units<T>(prefix_gradient_summaries<S, packs()>, p, plan, in.batch, stream);
  });
  if (error != 0) return error;
  error = launch_blocks<T>(prefix_gradient_scan<S>, p, in.batch, stream);
  if (error != 0) return error;
  error = with_packs(
      plan, [&](auto packs) { return launch_units<T>(prefix_gradients<S, packs()>, p, plan, in.batch, stream); });
  if (error != 0 || call.du == nullptr) return error;
  return add_parts(Parts<S>{1, units, in.dim, p.partial_du, nullptr, call.du, nullptr}, stream);
}

#define FOR(S)                                                                                 \
  template int pool_forward(const PoolForwardParams<S>&, const PoolPlan&, void*);              \
  template int pool_backward(const PoolBackwardParams<S>&, const PoolPlan&, void*);            \
  template int prefix_pool_forward(const PrefixPoolForwardParams<S>&, const PoolPlan&, void*); \
  template int prefix_pool_backward(const PrefixPoolBackwardParams<S>&, const PoolPlan&, void*);
FOR(float)
FOR(double)
FOR(BFloat16)
FOR(Float16)
#undef FOR

}  // namespace cuda
}  // namespace llm_ext
