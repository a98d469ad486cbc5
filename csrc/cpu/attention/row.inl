// One batch row of additive attention: its attended keys and the scores of a tile of queries.
#pragma once

#include "cpu/attention/workspace.inl"
#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/vec.inl"
#include "cpu/simd/vec_math.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Magnitudes are clamped to this before exponentials are taken, so that 1 + e^2q e^2k stays finite.
template <typename T>
constexpr T kExponentBound = sizeof(T) == 4 ? T(21.9) : T(177);
// tanh rounds to 1 from here on.
template <typename T>
constexpr T kSaturation = sizeof(T) == 4 ? T(9) : T(19);

// Whether, by their largest magnitudes, a query and a key may nearly cancel where one of them was clamped. If q was
// clamped and |k| <= bound - saturation, tanh is 1 or -1 with and without clamping.
template <typename T>
static inline bool may_cancel(T query_size, T key_size) {
  const T high = query_size > key_size ? query_size : key_size;
  const T low = query_size > key_size ? key_size : query_size;
  return high > kExponentBound<T> && low > kExponentBound<T> - kSaturation<T>;
}

// r of one pair from its own exponential, as exact as tanh of the sum.
template <typename S, typename T = Compute<S>>
static inline Vec<T> exact_reciprocal(const S* query, const S* key, int lanes) {
  const Vec<T> x = load_partial(query, lanes) + load_partial(key, lanes);
  return T(1) / (T(1) + vec_exp<T>(x + x));
}

// Exponentials of 0 < count <= kRowBlock rows of n numbers, into adjacent rows of a panel with `rows` rows, and the
// largest magnitude of each row.
template <typename S, typename T>
static inline void write_exponentials(const S* const* from, int count, int64_t n, T* panel, int64_t rows, T* sizes) {
  Vec<T> largest[kRowBlock] = {};
  for_each_vector<T>(n, [&](int64_t a, int lanes) {
    for (int j = 0; j < count; ++j) {
      Vec<T> x = load_partial(from[j] + a, lanes);
      const Vec<T> magnitude = x < T(0) ? -x : x;
      largest[j] = magnitude > largest[j] ? magnitude : largest[j];
      x = x > kExponentBound<T> ? broadcast(kExponentBound<T>) : x;
      x = x < -kExponentBound<T> ? broadcast(-kExponentBound<T>) : x;
      Vec<T> scale, expm1;
      exp_split<T>(x + x, &scale, &expm1);
      store(panel + a * rows + j * kLanes<T>, scale * expm1 + scale);
    }
  });
  for (int j = 0; j < count; ++j) {
    sizes[j] = T(0);
    for (int i = 0; i < kLanes<T>; ++i) sizes[j] = largest[j][i] > sizes[j] ? largest[j][i] : sizes[j];
  }
}

// Sums of v r over A, for `queries` queries and kRowBlock keys.
template <int queries, typename T>
static inline void pair_sums(const T* query, const T* keys, int64_t rows, const T* v, int64_t vectors,
                             Vec<T> (&sums)[kRowBlock][queries]) {
  for (int64_t a = 0; a < vectors; ++a) {
    const Vec<T> factor = load(v + a * kLanes<T>);
    Vec<T> q[queries];
#pragma GCC unroll 4
    for (int i = 0; i < queries; ++i) q[i] = load(query + (a * kQueryTile + i) * kLanes<T>);
#pragma GCC unroll 4
    for (int j = 0; j < kRowBlock; ++j) {
      const Vec<T> k = load(keys + (a * rows + j) * kLanes<T>);
#pragma GCC unroll 4
      for (int i = 0; i < queries; ++i) sums[j][i] += factor * reciprocal<T>(q[i] * k + T(1));
    }
  }
}

// One batch row, a tile of queries at a time, in the forward and the backward pass.
template <typename S>
class AdditiveRow {
 public:
  using T = Compute<S>;

  AdditiveRow(const AdditiveAttentionInput<S>& input, const AdditiveWorkspace<T>& workspace, const ThreadTeam& threads,
              bool backward)
      : in(input), w(workspace), team(threads), single_query(input.queries == 1 && !backward) {
    for (int64_t a = 0; a < w.vectors; ++a) store(w.v + a * kLanes<T>, Vec<T>{});
    convert(in.v, w.v, in.attn_dim);
    Vec<T> sum{};
    for (int64_t a = 0; a < w.vectors; ++a) sum += load(w.v + a * kLanes<T>);
    v_sum = sum_lanes<T>(sum);
  }

  // Finds the attended keys of a batch row and computes their exponentials.
  void begin(int64_t row) {
    b = row;
    find_keys();
    if (row > 0) team.sync();  // other threads may still read the previous row's
    own_keys = team.slice(divide_up(count, kRowBlock) * kRowBlock, kRowBlock);
    for (int64_t k = own_keys.begin; !single_query && k < own_keys.end; k += kRowBlock) {
      const S* from[kRowBlock];
      for (int j = 0; j < kRowBlock; ++j) from[j] = key(k + j);
      write_exponentials(from, kRowBlock, in.attn_dim, w.keys + k * kLanes<T>, w.rows, w.key_size + k);
    }
  }

  // Computes the exponentials of queries [first, first + n), n <= kQueryTile.
  void begin_tile(int64_t first, int64_t n) {
    q0 = first;
    queries = n;
    const Range own = team.slice(n, kRowBlock);
    for (int64_t q = own.begin; !single_query && q < own.end; q += kRowBlock) {
      const S* from[kRowBlock];
      const int rows = static_cast<int>(own.end - q < kRowBlock ? own.end - q : kRowBlock);
      for (int i = 0; i < rows; ++i) from[i] = query(q + i);
      write_exponentials(from, rows, in.attn_dim, w.query + q * kLanes<T>, kQueryTile, w.query_size + q);
    }
  }

  // Computes the scores of the tile for this thread's keys; -inf for masked pairs.
  void score() {
    for (int64_t k = own_keys.begin; !single_query && k < own_keys.end; k += kRowBlock) {
      for_each_block<kQueryBlock>(queries, [&](int64_t q, auto size) {
        Vec<T> sums[kRowBlock][size.value] = {};
        pair_sums<size.value>(w.query + q * kLanes<T>, w.keys + k * kLanes<T>, w.rows, w.v, w.vectors, sums);
        for (int j = 0; j < kRowBlock; ++j) {
          for (int i = 0; i < size.value; ++i) {
            w.scores[(k + j) * kQueryTile + q + i] = v_sum - T(2) * sum_lanes<T>(sums[j][i]);
          }
        }
      });
    }
    by_pair = single_query || any_may_cancel();
    const bool masked = in.mask != nullptr && in.mask_query_stride != 0;
    if (!by_pair && !masked) return;
    for (int64_t k = own_keys.begin; k < own_keys.end && k < count; ++k) {
      for (int64_t q = 0; q < queries; ++q) {
        T& score = w.scores[k * kQueryTile + q];
        if (masked && !in.mask[b * in.mask_batch_stride + (q0 + q) * in.mask_query_stride + w.attended[k]]) {
          score = -infinity<T>();
        } else if (single_query || may_cancel(w.query_size[q], w.key_size[k])) {
          Vec<T> sum{};
          for_each_vector<T>(in.attn_dim, [&](int64_t a, int lanes) {
            sum += load(w.v + a) * exact_reciprocal(query(q) + a, key(k) + a, lanes);
          });
          score = v_sum - T(2) * sum_lanes<T>(sum);
        }
      }
    }
  }

  const S* query(int64_t q) const { return in.query + (b * in.queries + q0 + q) * in.attn_dim; }
  // The position of an attended key; beyond the last, that of the last.
  int64_t position(int64_t k) const { return b * in.keys + w.attended[k < count ? k : count - 1]; }
  const S* key(int64_t k) const { return in.key + position(k) * in.attn_dim; }
  const S* value(int64_t k) const { return in.values + position(k) * in.value_dim; }
  // The offset of a pair in [B, Tq, Tk].
  int64_t pair(int64_t q, int64_t k) const { return (b * in.queries + q0 + q) * in.keys + w.attended[k]; }

  const AdditiveAttentionInput<S>& in;
  const AdditiveWorkspace<T> w;
  const ThreadTeam team;
  // A forward pass with a single query: each pair takes its own exponential, since those of the keys would be used
  // once.
  const bool single_query;
  int64_t b = 0;
  int64_t count = 0;    // attended keys
  int64_t q0 = 0;       // first query of the tile
  int64_t queries = 0;  // of the tile
  T v_sum = T(0);
  bool by_pair = false;  // whether some pair of the tile takes its own exponential
  Range own_keys{};      // this thread's, in whole blocks; keys beyond `count` repeat the last

 private:
  bool any_may_cancel() const {
    T query_size = T(0), key_size = T(0);
    for (int64_t q = 0; q < queries; ++q) query_size = w.query_size[q] > query_size ? w.query_size[q] : query_size;
    for (int64_t k = 0; k < count; ++k) key_size = w.key_size[k] > key_size ? w.key_size[k] : key_size;
    return may_cancel(query_size, key_size);
  }

  void find_keys() {
    const int64_t length = in.key_lengths == nullptr ? in.keys : in.key_lengths[b];
    const int64_t mask_rows = in.mask_query_stride == 0 ? 1 : in.queries;
    count = 0;
    for (int64_t k = 0; k < length; ++k) {
      bool seen = in.mask == nullptr;
      for (int64_t q = 0; !seen && q < mask_rows; ++q) {
        seen = in.mask[b * in.mask_batch_stride + q * in.mask_query_stride + k];
      }
      if (seen) w.attended[count++] = static_cast<int32_t>(k);
    }
  }
};

// Replaces the scores of one vector of queries, one per lane, by their exponentials relative to the largest. Returns
// what makes weights of them: the inverse of their sum, 0 for queries without a key. Both passes take the maximum and
// the sum of the scores that they have computed: a saved log-sum-exp would have the rounding error of large scores.
template <typename S, typename T = Compute<S>>
static inline Vec<T> tile_exponentials(const AdditiveRow<S>& row, T* scores) {
  Vec<T> largest = broadcast(-infinity<T>());
  for (int64_t k = 0; k < row.count; ++k) {
    const Vec<T> score = load(scores + k * kQueryTile);
    largest = score > largest ? score : largest;
  }
  const Vec<T> shift = largest == -infinity<T>() ? Vec<T>{} : largest;
  Vec<T> sum{};
  for (int64_t k = 0; k < row.count; ++k) {
    const Vec<T> exponential = vec_exp<T>(load(scores + k * kQueryTile) - shift);
    store(scores + k * kQueryTile, exponential);
    sum += exponential;
  }
  return sum == T(0) ? Vec<T>{} : T(1) / sum;
}

// Whether the whole team works on one batch row at a time, instead of each thread on its own batch rows.
template <typename S>
static inline bool splits_rows(const AdditiveAttentionInput<S>& in, int threads) {
  return in.batch % threads != 0 && in.batch < 4 * threads;
}

// Calls run(row) for each batch row of this thread, or of the team.
template <typename S, typename Row>
static inline void for_each_row(const AdditiveAttentionInput<S>& in, bool backward, Compute<S>* workspace,
                                const ThreadTeam& team, const Row& run) {
  const bool shared = splits_rows(in, team.size);
  const int64_t size = AdditiveWorkspace<Compute<S>>(in, backward).size();
  Compute<S>* own = workspace + team.rank * size;
  AdditiveRow<S> row(in, {in, backward, shared ? workspace : own, own}, shared ? team : ThreadTeam{0, 1, team.barrier},
                     backward);
  const Range batch = shared ? Range{0, in.batch} : team.slice(in.batch);
  for (int64_t b = batch.begin; b < batch.end; ++b) {
    row.begin(b);
    run(row);
  }
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
