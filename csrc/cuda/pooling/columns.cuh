// Shared by the pooling kernels: the columns that a thread owns, rows in registers, scores, and the steps of pooling
// and of its prefix form.
//
// A thread group owns a chunk of time of one batch row, and each of its threads some columns: their sums or state stay
// in registers for the whole chunk, and a tile of positions is loaded while the previous one is processed. Only dot
// products over all columns need an exchange between threads, once per tile. Rows that are whole 16-byte packs, at most
// 1024 of them, are held in registers. All others are processed one number at a time, with sums and state in the
// workspace.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/log_sum.cuh"
#include "cuda/pooling/launchers.h"
#include "cuda/word_pack.cuh"

namespace llm_ext {
namespace cuda {

constexpr int kPoolWarps = kPoolThreads / kWarpThreads;
// Blocks per multiprocessor and positions per tile. Of each array that is read, 64 or 128 bytes per thread, 32 KB per
// multiprocessor, are in flight forward, and half of that backward; more would not fit in registers.
template <int N>
constexpr int kBlocks = blocks_per_sm(N);
template <int N>
constexpr int kForwardRows = N > 1 ? 8 / N : 4;
template <int N>
constexpr int kBackwardRows = N > 2 ? 1 : 2;
// Sums that a thread group reduces at once.
constexpr int kMaxSums = 8;
// If a score exceeds all scores before it by more than this, their share of the state could underflow.
constexpr int kSafeRise = 60;

template <typename T>
constexpr size_t kSharedBytes = 2 * kPoolWarps * kMaxSums * sizeof(T);
static_assert(kSharedBytes<float> == slots_layout({}, 0, 0, sizeof(float)).sums, "slots_layout() must agree");

// The columns of a thread: N packs of 16 bytes, strided by the thread group; N = 0: any number of columns, one by one.
template <typename S, int N>
struct Columns {
  static constexpr int kWide = N > 0 ? LanePack<S>::kSize : 1;
  int64_t dim;
  int group_threads;
  int rank;  // of the thread in its group

  LLM_EXT_DEVICE Columns(int64_t dim, const PoolPlan& plan)
      : dim(dim), group_threads(plan.group_threads), rank(thread_index() & (plan.group_threads - 1)) {}

  // Whether this thread writes the scalar results of position r of a tile.
  LLM_EXT_DEVICE bool writes(int r) const { return rank == (r & (group_threads - 1)); }

  // Calls f(i, column) for each pack i. A pack in registers may be beyond D: it is zero, and neither read nor written.
  template <typename F>
  LLM_EXT_DEVICE void for_each(const F& f) const {
    if constexpr (N > 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) f(i, (static_cast<int64_t>(i) * group_threads + rank) * kWide);
    } else {
      for (int64_t column = rank; column < dim; column += group_threads) f(0, column);
    }
  }
  // Calls f(i, column, j) for each number j of each pack.
  template <typename F>
  LLM_EXT_DEVICE void for_each_number(const F& f) const {
    for_each([&](int i, int64_t column) {
#pragma unroll
      for (int j = 0; j < kWide; ++j) f(i, column, j);
    });
  }
};

// R rows of an input; absent rows are zero.
template <typename S, int N, int R>
struct Tile {
  LanePack<S> held[R][N > 0 ? N : 1];
  const S* in_memory[N > 0 ? 1 : R];
  unsigned presence;  // one bit per row

  // Loads row_of(r); null: the row is absent.
  template <typename F>
  LLM_EXT_DEVICE void load(const Columns<S, N>& columns, const F& row_of) {
    presence = 0;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const S* row = row_of(r);
      presence |= (row != nullptr ? 1u : 0u) << r;
      if constexpr (N > 0) {
        columns.for_each([&](int i, int64_t column) {
          held[r][i] = {};
          if (row != nullptr && column < columns.dim) held[r][i].load(row + column);
        });
      } else {
        in_memory[r] = row;
      }
    }
  }
  LLM_EXT_DEVICE bool present(int r) const { return (presence >> r & 1) != 0; }
  LLM_EXT_DEVICE Compute<S> at(int r, int i, int64_t column, int j) const {
    if constexpr (N > 0) {
      return held[r][i][j];
    } else {
      return present(r) ? widen(in_memory[r][column]) : Compute<S>(0);
    }
  }
};

// A row of sums or of state: in registers between begin() and end() if N > 0, otherwise in memory.
template <typename S, int N>
struct Held {
  using T = Compute<S>;
  static constexpr int kWide = Columns<S, N>::kWide;
  using Words = Pack<T, (N > 0 ? 16 / sizeof(T) : 1)>;
  T own[N > 0 ? N * kWide : 1];
  T* memory;

  // Starts from a row of T; null: zeros.
  LLM_EXT_DEVICE void begin(const Columns<S, N>& columns, T* in_memory, const T* from) {
    memory = in_memory;
    if constexpr (N > 0) {
      columns.for_each([&](int i, int64_t column) {
#pragma unroll
        for (int j = 0; j < kWide; j += sizeof(Words) / sizeof(T)) {
          Words words = {};
          if (from != nullptr && column < columns.dim) words = *reinterpret_cast<const Words*>(from + column + j);
#pragma unroll
          for (int k = 0; k < static_cast<int>(sizeof(Words) / sizeof(T)); ++k) own[i * kWide + j + k] = words.at[k];
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
        for (int j = 0; j < kWide; j += sizeof(Words) / sizeof(T)) {
          Words words;
#pragma unroll
          for (int k = 0; k < static_cast<int>(sizeof(Words) / sizeof(T)); ++k) words.at[k] = own[i * kWide + j + k];
          *reinterpret_cast<Words*>(to + column + j) = words;
        }
      });
    }
  }
};

// Computes the numbers value(j) of a pack, and writes them unless `to` is null.
template <int N, typename S, typename F>
LLM_EXT_DEVICE void write_pack(S* to, const F& value) {
  if constexpr (N > 0) {
    LanePack<S> pack;
#pragma unroll
    for (int j = 0; j < LanePack<S>::kSize; ++j) pack.set(j, narrow<S>(value(j)));
    if (to != nullptr) pack.store(to);
  } else {
    const S number = narrow<S>(value(0));
    if (to != nullptr) *to = number;
  }
}
// Writes value(i, column, j) as a row of S.
template <typename S, int N, typename F>
LLM_EXT_DEVICE void write_row(const Columns<S, N>& columns, S* to, const F& value) {
  columns.for_each([&](int i, int64_t column) {
    write_pack<N>(column < columns.dim ? to + column : nullptr, [&](int j) { return value(i, column, j); });
  });
}

// ---- positions

template <typename S>
LLM_EXT_DEVICE int64_t offset_of(const PoolInput<S>& in, int64_t b, int64_t t) {
  return b * in.e_batch_stride + t * in.e_step_stride;
}

// The attended positions of a chunk, counted from its beginning.
template <typename S>
struct AttendedPositions {
  int count;
  const bool* mask;  // null: all positions before `count` are attended

  // For positions [begin, end) of row b.
  LLM_EXT_DEVICE AttendedPositions(const PoolInput<S>& in, int64_t b, int64_t begin, int64_t end)
      : mask(in.mask == nullptr ? nullptr : in.mask + b * in.steps + begin) {
    if (in.lengths != nullptr && in.lengths[b] < end) end = in.lengths[b];
    count = end > begin ? static_cast<int>(end - begin) : 0;
  }
  LLM_EXT_DEVICE bool attends(int i) const { return i < count && (mask == nullptr || mask[i]); }
};

// Sums over the threads of each group in a fixed order; every thread gets the sums. All threads of the block call this.
template <typename T>
struct GroupSum {
  T* shared;  // two buffers, alternating, so that one barrier suffices
  int group_threads;
  int turn;

  template <int n>
  LLM_EXT_DEVICE void operator()(T (&sums)[n]) {
    static_assert(n <= kMaxSums, "shared memory has no room for more sums");
    for (int mask = (group_threads < kWarpThreads ? group_threads : kWarpThreads) / 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int r = 0; r < n; ++r) sums[r] += shuffle_xor(sums[r], mask);
    }
    if (group_threads <= kWarpThreads) return;
    T* at = shared + turn * kPoolWarps * kMaxSums;
    turn ^= 1;
    if (lane_index() == 0) {
#pragma unroll
      for (int r = 0; r < n; ++r) at[warp_index() * kMaxSums + r] = sums[r];
    }
    block_barrier();
    const int warps = group_threads / kWarpThreads, first = warp_index() / warps * warps;
#pragma unroll
    for (int r = 0; r < n; ++r) sums[r] = T(0);
    for (int w = first; w < first + warps; ++w) {
#pragma unroll
      for (int r = 0; r < n; ++r) sums[r] += at[w * kMaxSums + r];
    }
  }
};

template <typename T>
LLM_EXT_DEVICE GroupSum<T> group_sum(int group_threads) {
  return {reinterpret_cast<T*>(shared_memory()), group_threads, 0};
}

// Scores of the positions of a tile, -inf for masked ones: e . u, or `given` if u is null.
template <typename S, int N, int R>
LLM_EXT_DEVICE void score(const PoolInput<S>& in, const Columns<S, N>& columns, const Tile<S, N, R>& e,
                          const Tile<S, N, 1>& u, const S* given, GroupSum<Compute<S>>& sum, Compute<S> (&scores)[R]) {
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

// The running mean of rows, weighted by the softmax of their scores.
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
  // Leaves the mean in c and returns the log-sum-exp.
  LLM_EXT_DEVICE LogSum<T> end(const Columns<S, N>& columns) {
    const bool empty = max == -kInfinity<T>;
    const T scale = empty ? T(0) : T(1) / total;
    columns.for_each_number([&](int n, int64_t column, int j) { c.at(n, column, j) *= scale; });
    return {max, total};
  }
};

// Computes, from the scores of a tile and the log-sum-exp l before it, the share of each position and keep = 1 - share
// of the state before it. Updates l. A score of -inf is that of a masked position.
template <int R, typename T>
LLM_EXT_DEVICE void prefix_shares(const T (&scores)[R], LogSum<T>& l, T (&keep)[R], T (&share)[R]) {
  T max = l.max;
#pragma unroll
  for (int r = 0; r < R; ++r) max = scores[r] > max ? scores[r] : max;
  const T base = l.max > scores[0] ? l.max : scores[0];
  if (max - base < T(kSafeRise)) {
    // All relative to the largest score: the exponentials are independent.
    T sum = l.sum * share_of(l.max - max);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const T weight = share_of(scores[r] - max), before = sum;
      sum += weight;
      const T inverse = reciprocal(sum);
      keep[r] = weight == T(0) ? T(1) : before * inverse;
      share[r] = weight * inverse;
    }
    l = {max, sum};
    return;
  }
#pragma unroll
  for (int r = 0; r < R; ++r) add_scores(l, {scores[r], T(1)}, keep[r], share[r]);
}

// c_t = keep_t c_{t-1} + share_t e_t for a tile; writes the first `count` states.
template <typename S, int N, int R>
LLM_EXT_DEVICE void write_states(const Columns<S, N>& columns, Held<S, N>& c, const Tile<S, N, R>& e,
                                 const Compute<S> (&keep)[R], const Compute<S> (&share)[R], S* to, int64_t stride,
                                 int count) {
  columns.for_each([&](int n, int64_t column) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      write_pack<N>(column < columns.dim && r < count ? to + r * stride + column : nullptr, [&](int j) {
        Compute<S>& state = c.at(n, column, j);
        return state = keep[r] * state + share[r] * e.at(r, n, column, j);
      });
    }
  });
}

// ---- launches

// Calls run(std::integral_constant<int, packs>); packs is at least 1.
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
