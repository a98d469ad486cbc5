// What the kernels of pooling have in common: the columns that a thread owns, rows that are read or held, scores, and
// the steps of pooling and of its prefix form.
#pragma once

#include <limits>
#include <type_traits>

#include "cuda/attention/launchers.h"
#include "cuda/device.cuh"

namespace llm_ext {
namespace cuda {

constexpr int kPoolWarps = kPoolThreads / kWarpThreads;
// Blocks that a multiprocessor has room for, and positions of a tile. A thread has 64 or 128 bytes under way, a
// multiprocessor 32 KB, of each array that is read; more do not fit the registers.
template <int N>
constexpr int kBlocks = N == 1 ? 2 : 1;
template <int N>
constexpr int kForwardRows = N > 1 ? 8 / N : 4;
template <int N>
constexpr int kBackwardRows = N > 2 ? 1 : 2;
// Numbers that a team adds up at once.
constexpr int kMostSums = 8;
// A score that exceeds all before it by more than this could make their share of the state underflow.
constexpr int kSafeRise = 60;

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <typename T>
constexpr size_t kSharedBytes = 2 * kPoolWarps * kMostSums * sizeof(T);
static_assert(kSharedBytes<float> == rounds_layout({}, 0, 0, sizeof(float)).sums, "the same in rounds");

// exp(x) of an x that is at most 0 and may be -inf.
template <typename T>
LLM_EXT_DEVICE T share_of(T x) {
  return x == -kInfinity<T> ? T(0) : exp_of(x);
}

// ---- what a thread owns

// Columns: N packs of 16 bytes, as far apart as the team is wide; N = 0: any number of them, one by one.
template <typename S, int N>
struct Columns {
  static constexpr int kWide = N > 0 ? 16 / sizeof(S) : 1;
  int64_t dim;
  int team;
  int rank;  // of the thread in its team

  LLM_EXT_DEVICE Columns(int64_t dim, const PoolPlan& plan)
      : dim(dim), team(plan.team), rank(thread_index() & (plan.team - 1)) {}

  // Whether what there is one of for position r of a tile is this thread's to write.
  LLM_EXT_DEVICE bool writes(int r) const { return rank == (r & (team - 1)); }

  // f(i, column) of each pack i. A pack that is held may lie beyond D: it is neither read nor written, and zero.
  template <typename F>
  LLM_EXT_DEVICE void for_each(const F& f) const {
    if constexpr (N > 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) f(i, (static_cast<int64_t>(i) * team + rank) * kWide);
    } else {
      for (int64_t column = rank; column < dim; column += team) f(0, column);
    }
  }
  // The same, and f(i, column, j) of each number j of a pack.
  template <typename F>
  LLM_EXT_DEVICE void for_each_number(const F& f) const {
    for_each([&](int i, int64_t column) {
#pragma unroll
      for (int j = 0; j < kWide; ++j) f(i, column, j);
    });
  }
};

// R rows that are read; one that is absent is zero.
template <typename S, int N, int R>
struct Tile {
  static constexpr int kWide = Columns<S, N>::kWide;
  Pack<S, kWide> held[R][N > 0 ? N : 1];
  const S* in_memory[N > 0 ? 1 : R];
  unsigned presence;  // a bit for each row

  // From row_of(r), null where the row is absent.
  template <typename F>
  LLM_EXT_DEVICE void load(const Columns<S, N>& columns, const F& row_of) {
    presence = 0;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const S* row = row_of(r);
      presence |= (row != nullptr ? 1u : 0u) << r;
      if constexpr (N > 0) {
        columns.for_each([&](int i, int64_t column) {
          held[r][i] = row != nullptr && column < columns.dim ? *reinterpret_cast<const Pack<S, kWide>*>(row + column)
                                                              : Pack<S, kWide>{};
        });
      } else {
        in_memory[r] = row;
      }
    }
  }
  LLM_EXT_DEVICE bool present(int r) const { return (presence >> r & 1) != 0; }
  LLM_EXT_DEVICE Compute<S> at(int r, int i, int64_t column, int j) const {
    if constexpr (N > 0) {
      return widen(held[r][i].at[j]);
    } else {
      return present(r) ? widen(in_memory[r][column]) : Compute<S>(0);
    }
  }
};

// A row of sums or of state: in registers between begin() and end(), or in memory all the time.
template <typename S, int N>
struct Held {
  using T = Compute<S>;
  static constexpr int kWide = Columns<S, N>::kWide;
  using Part = Pack<T, (N > 0 ? 16 / sizeof(T) : 1)>;
  T own[N > 0 ? N * kWide : 1];
  T* memory;

  // From a row of T; null: zeros.
  LLM_EXT_DEVICE void begin(const Columns<S, N>& columns, T* in_memory, const T* from) {
    memory = in_memory;
    if constexpr (N > 0) {
      columns.for_each([&](int i, int64_t column) {
#pragma unroll
        for (int j = 0; j < kWide; j += sizeof(Part) / sizeof(T)) {
          Part part = {};
          if (from != nullptr && column < columns.dim) part = *reinterpret_cast<const Part*>(from + column + j);
#pragma unroll
          for (int k = 0; k < static_cast<int>(sizeof(Part) / sizeof(T)); ++k) own[i * kWide + j + k] = part.at[k];
        }
      });
    } else if (from != memory) {
      columns.for_each([&](int, int64_t column) { memory[column] = from != nullptr ? from[column] : T(0); });
    }
  }
  LLM_EXT_DEVICE T& at(int i, int64_t column, int j) {
    if constexpr (N > 0) {
      return own[i * kWide + j];
    } else {
      return memory[column];
    }
  }
  LLM_EXT_DEVICE void end(const Columns<S, N>& columns, T* to) {
    if constexpr (N > 0) {
      columns.for_each([&](int i, int64_t column) {
        if (column >= columns.dim) return;
#pragma unroll
        for (int j = 0; j < kWide; j += sizeof(Part) / sizeof(T)) {
          Part part;
#pragma unroll
          for (int k = 0; k < static_cast<int>(sizeof(Part) / sizeof(T)); ++k) part.at[k] = own[i * kWide + j + k];
          *reinterpret_cast<Part*>(to + column + j) = part;
        }
      });
    }
  }
};

// Writes a row of S: value(i, column, j) of each number.
template <typename S, int N, typename F>
LLM_EXT_DEVICE void write_row(const Columns<S, N>& columns, S* to, const F& value) {
  constexpr int kWide = Columns<S, N>::kWide;
  columns.for_each([&](int i, int64_t column) {
    Pack<S, kWide> pack;
#pragma unroll
    for (int j = 0; j < kWide; ++j) pack.at[j] = narrow<S>(value(i, column, j));
    if (column < columns.dim) *reinterpret_cast<Pack<S, kWide>*>(to + column) = pack;
  });
}

// ---- positions

template <typename S>
LLM_EXT_DEVICE int64_t offset_of(const PoolInput<S>& in, int64_t b, int64_t t) {
  return b * in.e_batch_stride + t * in.e_step_stride;
}

// Which positions of a chunk take part; they are counted from its begin.
template <typename S>
struct Admission {
  int count;
  const bool* mask;  // null: all before that take part

  // Of positions [begin, end) of row b.
  LLM_EXT_DEVICE Admission(const PoolInput<S>& in, int64_t b, int64_t begin, int64_t end)
      : mask(in.mask == nullptr ? nullptr : in.mask + b * in.steps + begin) {
    if (in.lengths != nullptr && in.lengths[b] < end) end = in.lengths[b];
    count = end > begin ? static_cast<int>(end - begin) : 0;
  }
  LLM_EXT_DEVICE bool admits(int i) const { return i < count && (mask == nullptr || mask[i]); }
};

// Sums over the threads of each team, in a fixed order, in all of them. All threads of the block come together.
template <typename T>
struct TeamSum {
  T* shared;  // two places, in turn, so that one barrier will do
  int team;
  int turn;

  template <int n>
  LLM_EXT_DEVICE void operator()(T (&sums)[n]) {
    static_assert(n <= kMostSums, "there is room for no more");
    for (int mask = (team < kWarpThreads ? team : kWarpThreads) / 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int r = 0; r < n; ++r) sums[r] += shuffle_xor(sums[r], mask);
    }
    if (team <= kWarpThreads) return;
    T* at = shared + turn * kPoolWarps * kMostSums;
    turn ^= 1;
    if (lane_index() == 0) {
#pragma unroll
      for (int r = 0; r < n; ++r) at[warp_index() * kMostSums + r] = sums[r];
    }
    block_barrier();
    const int warps = team / kWarpThreads, first = warp_index() / warps * warps;
#pragma unroll
    for (int r = 0; r < n; ++r) sums[r] = T(0);
    for (int w = first; w < first + warps; ++w) {
#pragma unroll
      for (int r = 0; r < n; ++r) sums[r] += at[w * kMostSums + r];
    }
  }
};

template <typename T>
LLM_EXT_DEVICE TeamSum<T> team_sum(int team) {
  return {reinterpret_cast<T*>(shared_memory()), team, 0};
}

// Scores of the positions of a tile: -inf where one takes no part. Where u does not give them, from `given` on.
template <typename S, int N, int R>
LLM_EXT_DEVICE void score(const PoolInput<S>& in, const Columns<S, N>& columns, const Tile<S, N, R>& e,
                          const Tile<S, N, 1>& u, const S* given, TeamSum<Compute<S>>& sum, Compute<S> (&scores)[R]) {
  using T = Compute<S>;
#pragma unroll
  for (int r = 0; r < R; ++r) scores[r] = T(0);
  if (in.u != nullptr) {
    columns.for_each_number([&](int i, int64_t column, int j) {
#pragma unroll
      for (int r = 0; r < R; ++r) scores[r] += e.at(r, i, column, j) * u.at(0, i, column, j);
    });
    sum(scores);
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (!e.present(r)) {
      scores[r] = -kInfinity<T>;
    } else if (in.u == nullptr) {
      scores[r] = widen(given[r]);
    }
  }
}

// ---- steps

// The mean of rows by softmax of their scores, as they come.
template <typename S, int N>
struct Pooled {
  using T = Compute<S>;
  Held<S, N> c;
  T max, total;

  LLM_EXT_DEVICE void begin(const Columns<S, N>& columns, T* in_memory) {
    c.begin(columns, in_memory, nullptr);
    max = -kInfinity<T>;
    total = T(0);
  }
  template <int R>
  LLM_EXT_DEVICE void add(const Columns<S, N>& columns, const Tile<S, N, R>& e, const T (&scores)[R]) {
    T high = max;
#pragma unroll
    for (int r = 0; r < R; ++r) high = scores[r] > high || scores[r] != scores[r] ? scores[r] : high;
    if (high == -kInfinity<T>) return;
    const T rescale = share_of(max - high);
    max = high;
    total *= rescale;
    T weights[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      weights[r] = share_of(scores[r] - high);
      total += weights[r];
    }
    columns.for_each_number([&](int n, int64_t column, int j) {
      T value = c.at(n, column, j) * rescale;
#pragma unroll
      for (int r = 0; r < R; ++r) value += weights[r] * e.at(r, n, column, j);
      c.at(n, column, j) = value;
    });
  }
  // Leaves the mean in c, and returns the log-sum-exp.
  LLM_EXT_DEVICE T end(const Columns<S, N>& columns) {
    const bool empty = max == -kInfinity<T>;
    const T scale = empty ? T(0) : T(1) / total;
    columns.for_each_number([&](int n, int64_t column, int j) { c.at(n, column, j) *= scale; });
    return empty ? max : max + log_of(total);
  }
};

// From the scores of a tile and the log-sum-exp l before it, which is updated: the share of each position, and that of
// the state before it, which is 1 - share. A score of -inf is that of a position that takes no part.
template <int R, typename T>
LLM_EXT_DEVICE void prefix_shares(const T (&scores)[R], T& l, T (&keep)[R], T (&share)[R]) {
  T max = l;
#pragma unroll
  for (int r = 0; r < R; ++r) max = scores[r] > max ? scores[r] : max;
  const T base = l > scores[0] ? l : scores[0];
  if (max - base < T(kSafeRise)) {
    // All relative to the largest: exponentials that do not wait for each other.
    T sum = share_of(l - max);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const T weight = share_of(scores[r] - max), before = sum;
      sum += weight;
      const T inverse = reciprocal(sum);
      keep[r] = weight == T(0) ? T(1) : before * inverse;
      share[r] = weight * inverse;
    }
    l = max + log_of(sum);
    return;
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const T s = scores[r];
    keep[r] = T(1);
    share[r] = T(0);
    if (s == -kInfinity<T>) continue;
    const bool falls = l > s;
    const T high = falls ? l : s;
    const T ratio = share_of((falls ? s : l) - high);
    const T larger = reciprocal(T(1) + ratio);
    keep[r] = falls ? larger : ratio * larger;
    share[r] = falls ? ratio * larger : larger;
    l = high + log1p_of(ratio);
  }
}

// c_t = keep_t c_{t-1} + share_t e_t of a tile; writes those of the first `count` positions.
template <typename S, int N, int R>
LLM_EXT_DEVICE void write_states(const Columns<S, N>& columns, Held<S, N>& c, const Tile<S, N, R>& e,
                                 const Compute<S> (&keep)[R], const Compute<S> (&share)[R], S* to, int64_t stride,
                                 int count) {
  constexpr int kWide = Columns<S, N>::kWide;
  columns.for_each([&](int n, int64_t column) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      Pack<S, kWide> pack;
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        Compute<S>& state = c.at(n, column, j);
        state = keep[r] * state + share[r] * e.at(r, n, column, j);
        pack.at[j] = narrow<S>(state);
      }
      if (column < columns.dim && r < count) *reinterpret_cast<Pack<S, kWide>*>(to + r * stride + column) = pack;
    }
  });
}

// ---- launches

// run(std::integral_constant<int, packs>), packs being at least 1.
template <typename F>
int with_held_packs(const PoolPlan& plan, const F& run) {
  switch (plan.packs) {
    case 1:
      return run(std::integral_constant<int, 1>{});
    case 2:
      return run(std::integral_constant<int, 2>{});
    default:
      return run(std::integral_constant<int, 4>{});
  }
}
template <typename F>
int with_packs(const PoolPlan& plan, const F& run) {
  if (plan.packs == 0) return run(std::integral_constant<int, 0>{});
  return with_held_packs(plan, run);
}

}  // namespace cuda
}  // namespace llm_ext
