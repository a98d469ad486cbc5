// Additive attention: scores v . tanh(q + k) of all pairs, softmax over the keys, the mean of the values; and back.
// docs/attention.md derives the formulas, docs/cuda.md counts the operations.
//
// Nothing of Tq x Tk x A is stored: what belongs to a pair and one of the A numbers lives in registers, and is computed
// again in the backward pass. Scores are stored, of a slab of queries, which is so small that they take no more room
// than queries and keys.
//
// tanh(q + k) = 1 - 2 r with r = 1 / (1 + e^2q e^2k). So exponentials are taken of a tile of queries and one of keys,
// when they are brought to shared memory, and a pair costs a multiply-add and a reciprocal, which two of its A numbers
// share: v / x + w / y = (v y + w x) / (x y). Where some |q| or |k| of the two tiles is so large that this could
// overflow, and in float64, each pair takes the exponential of the sum q + k, which may cancel.
#include <limits>
#include <type_traits>

#include "cuda/attention/launchers.h"
#include "cuda/device.cuh"
#include "cuda/reduce_partial_sums.h"

namespace llm_ext {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kChunk = 64;           // of the A numbers, in shared memory at once
constexpr int kStride = kChunk + 4;  // between rows there, so that those which lanes read at once lie in other banks
// With all |q| and |k| up to this, x y <= (1 + e^42)^2 = 3e36.
constexpr float kLargest = 10.5f;

template <typename T>
constexpr T kNone = -std::numeric_limits<T>::infinity();
// Numbers that are moved at once.
template <typename T>
constexpr int kPart = 16 / sizeof(T);

template <int n, typename T>
LLM_EXT_DEVICE void read(const T* from, T (&to)[n]) {
  constexpr int kEach = n < kPart<T> ? n : kPart<T>;
#pragma unroll
  for (int i = 0; i < n; i += kEach) {
    const Pack<T, kEach> pack = *reinterpret_cast<const Pack<T, kEach>*>(from + i);
#pragma unroll
    for (int j = 0; j < kEach; ++j) to[i + j] = pack.at[j];
  }
}

// ---- a pair

// Whether pairs with this number take the exact way.
LLM_EXT_DEVICE bool is_large(float x) { return !(x <= kLargest && x >= -kLargest); }
LLM_EXT_DEVICE bool is_large(double) { return true; }

// 1 / (1 + e^2x) of any x.
template <typename T>
LLM_EXT_DEVICE T exact_r(T x) {
  constexpr T kSaturated = std::is_same_v<T, double> ? 150 : 40;
  x = x > kSaturated ? kSaturated : (x < -kSaturated ? -kSaturated : x);
  return reciprocal(T(1) + exact_exp_of(2 * x));
}

// ---- rows of queries or keys

// Rows [B, count, A], and which of them are there: keys that no query sees may hold anything, and count as 0.
template <typename S>
struct Rows {
  const S* data;
  int64_t count;
  const int64_t* lengths;  // [B]; null: all are there
  const bool* seen;        // [B, count]; null: all are there

  LLM_EXT_DEVICE bool has(int64_t b, int64_t row) const {
    return row < count && (lengths == nullptr || row < lengths[b]) && (seen == nullptr || seen[b * count + row]);
  }
};

// A tile of rows on its way to shared memory: kChunk numbers of each. Between load() and store() the block agrees on
// the way that pairs take.
template <typename S, int kRows>
struct Staged {
  using T = Compute<S>;
  static constexpr int kParts = kChunk / kPart<T>;  // of a row
  static constexpr int kEach = (kRows * kParts + kThreads - 1) / kThreads;
  T x[kEach][kPart<T>];

  // Rows from `first` on, before `end`, numbers from `begin` on. Says whether one of them is large.
  LLM_EXT_DEVICE bool load(const Rows<S>& rows, int64_t b, int64_t first, int64_t end, int64_t begin, int64_t A) {
    bool large = false;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int place = i * kThreads + thread_index();
      const int64_t row = first + place / kParts, a = begin + place % kParts * kPart<T>;
      Pack<S, kPart<T>> pack = {};
      if (place < kRows * kParts && row < end && rows.has(b, row)) {
        const S* from = rows.data + (b * rows.count + row) * A + a;
        if (A % kPart<T> == 0 && a < A) {
          pack = *reinterpret_cast<const Pack<S, kPart<T>>*>(from);
        } else {
#pragma unroll
          for (int j = 0; j < kPart<T>; ++j) {
            if (a + j < A) pack.at[j] = from[j];
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kPart<T>; ++j) {
        x[i][j] = widen(pack.at[j]);
        large |= is_large(x[i][j]);
      }
    }
    return large;
  }
  // The numbers themselves, or e^2x.
  LLM_EXT_DEVICE void store(T* to, bool exact) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int place = i * kThreads + thread_index();
      if (place >= kRows * kParts) continue;
      Pack<T, kPart<T>> pack;
#pragma unroll
      for (int j = 0; j < kPart<T>; ++j) pack.at[j] = exact ? x[i][j] : exact_exp_of(2 * x[i][j]);
      *reinterpret_cast<Pack<T, kPart<T>>*>(to + place / kParts * kStride + place % kParts * kPart<T>) = pack;
    }
  }
};

// Whether any thread of the block says so; all have arrived. `flags` has a place for each warp, and is read until the
// next barrier.
LLM_EXT_DEVICE bool any_of_block(bool value, int* flags) {
  int any = value ? 1 : 0;
#pragma unroll
  for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) any |= shuffle_xor(any, mask);
  if (lane_index() == 0) flags[warp_index()] = any;
  block_barrier();
  any = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) any |= flags[w];
  return any != 0;
}

// How a block shares a tile of pairs: a thread has kQ rows of queries, far apart, and kK of keys; those that have
// the same pairs share the A numbers, slice by slice.
template <int kQ_, int kQueryThreads, int kKeyThreads>
struct PairTile {
  static constexpr int kQ = kQ_, kK = 4;
  static constexpr int kQueryStep = kQueryThreads, kKeyStep = kKeyThreads;
  static constexpr int kQueries = kQ * kQueryThreads, kKeys = kK * kKeyThreads;
  static constexpr int kEach = kQueryThreads * kKeyThreads;  // threads of a slice
  static constexpr int kSlices = kThreads / kEach;
};
// For many queries, for few, and for one.
using ManyPairs = PairTile<4, 8, 8>;
using FewPairs = PairTile<4, 2, 8>;
using OneQuery = PairTile<1, 1, 16>;

constexpr int larger(int a, int b) { return a > b ? a : b; }

// ---- scores

template <typename S>
struct ScoreParams {
  AdditiveAttentionInput<S> in;
  Rows<S> keys;
  int64_t first, count;  // the queries of the slab
  int64_t query_tiles, key_tiles;
  Compute<S>* scores;  // [B, count, Tk] out: -inf where a key takes no part
};

template <typename T, typename Tile>
constexpr int kScoreNumbers =
    larger((Tile::kQueries + Tile::kKeys) * kStride + kChunk, Tile::kSlices* Tile::kQueries* Tile::kKeys);

// The exponentials of float64 want more registers.
template <typename S, typename Tile>
LLM_EXT_SHARING_KERNEL(kThreads, (std::is_same_v<S, double> ? 1 : 2))
void additive_scores(LLM_EXT_PARAMS ScoreParams<S> p) {
  using T = Compute<S>;
  constexpr int kQ = Tile::kQ, kK = Tile::kK;
  const AdditiveAttentionInput<S>& in = p.in;
  const int64_t b = block_x() / (p.query_tiles * p.key_tiles), tile = block_x() % (p.query_tiles * p.key_tiles);
  const int64_t q0 = p.first + tile / p.key_tiles * Tile::kQueries, k0 = tile % p.key_tiles * Tile::kKeys;
  const int64_t end = p.first + p.count;
  const Rows<S> queries = {in.query, in.queries, nullptr, nullptr};
  T* numbers = reinterpret_cast<T*>(shared_memory());
  T* q_rows = numbers;
  T* k_rows = q_rows + Tile::kQueries * kStride;
  T* v_row = k_rows + Tile::kKeys * kStride;
  int* flags = reinterpret_cast<int*>(numbers + kScoreNumbers<T, Tile>);
  const int slice = thread_index() / Tile::kEach;
  const int of_keys = thread_index() % Tile::kKeyStep, of_queries = thread_index() % Tile::kEach / Tile::kKeyStep;

  // Rows of a thread of which there is one at all in this tile: beyond the last query and key nothing is computed.
  const auto rows_of = [](int64_t left, int step, int most) {
    const int64_t used = (left + step - 1) / step;
    return static_cast<int>(used < most ? used : most);
  };
  const int q_used = rows_of(end - q0, Tile::kQueryStep, kQ), k_used = rows_of(in.keys - k0, Tile::kKeyStep, kK);

  // Of v . tanh = sum of v - 2 sum of v r this thread's part.
  T v_sum = T(0), vr[kQ][kK] = {};
  const auto add_chunk = [&](auto exact, auto whole) {
#pragma unroll 1
    for (int part = slice; part < kChunk / kPart<T>; part += Tile::kSlices) {
      T v[kPart<T>], k[kK][kPart<T>];
      read(v_row + part * kPart<T>, v);
#pragma unroll
      for (int n = 0; n < kPart<T>; ++n) v_sum += v[n];
#pragma unroll
      for (int j = 0; j < kK; ++j) read(k_rows + (of_keys + j * Tile::kKeyStep) * kStride + part * kPart<T>, k[j]);
#pragma unroll
      for (int i = 0; i < kQ; ++i) {
        if (!decltype(whole)::value && i >= q_used) continue;
        T q[kPart<T>];
        read(q_rows + (of_queries + i * Tile::kQueryStep) * kStride + part * kPart<T>, q);
#pragma unroll
        for (int j = 0; j < kK; ++j) {
          if (!decltype(whole)::value && j >= k_used) continue;
#pragma unroll
          for (int n = 0; n < kPart<T>; n += 2) {
            if constexpr (decltype(exact)::value) {
              vr[i][j] += v[n] * exact_r(q[n] + k[j][n]) + v[n + 1] * exact_r(q[n + 1] + k[j][n + 1]);
            } else {
              const T x = T(1) + q[n] * k[j][n], y = T(1) + q[n + 1] * k[j][n + 1];
              vr[i][j] += (v[n] * y + v[n + 1] * x) * reciprocal(x * y);
            }
          }
        }
      }
    }
  };
  for (int64_t begin = 0; begin < in.attn_dim; begin += kChunk) {
    Staged<S, Tile::kQueries> q;
    Staged<S, Tile::kKeys> k;
    bool exact = q.load(queries, b, q0, end, begin, in.attn_dim);
    exact |= k.load(p.keys, b, k0, in.keys, begin, in.attn_dim);
    exact = any_of_block(exact, flags);
    q.store(q_rows, exact);
    k.store(k_rows, exact);
    if (thread_index() < kChunk) {
      const int64_t a = begin + thread_index();
      v_row[thread_index()] = a < in.attn_dim ? widen(in.v[a]) : T(0);
    }
    block_barrier();
    if (std::is_same_v<T, double> || exact) {
      add_chunk(std::true_type{}, std::false_type{});
    } else if (q_used == kQ && k_used == kK) {
      add_chunk(std::false_type{}, std::true_type{});
    } else {
      add_chunk(std::false_type{}, std::false_type{});
    }
  }

  block_barrier();
#pragma unroll
  for (int i = 0; i < kQ; ++i) {
#pragma unroll
    for (int j = 0; j < kK; ++j) {
      const int query = of_queries + i * Tile::kQueryStep, key = of_keys + j * Tile::kKeyStep;
      numbers[(slice * Tile::kQueries + query) * Tile::kKeys + key] = v_sum - 2 * vr[i][j];
    }
  }
  block_barrier();
  for (int pair = thread_index(); pair < Tile::kQueries * Tile::kKeys; pair += kThreads) {
    const int64_t q = q0 + pair / Tile::kKeys, k = k0 + pair % Tile::kKeys;
    if (q >= end || k >= in.keys) continue;
    T score = T(0);
#pragma unroll
    for (int s = 0; s < Tile::kSlices; ++s) score += numbers[s * Tile::kQueries * Tile::kKeys + pair];
    const bool admitted = (in.key_lengths == nullptr || k < in.key_lengths[b]) &&
                          (in.mask == nullptr || in.mask[b * in.mask_batch_stride + q * in.mask_query_stride + k]);
    p.scores[(b * p.count + q - p.first) * in.keys + k] = admitted ? score : kNone<T>;
  }
}

// ---- which keys are seen by any query, where each query has its own mask

template <typename S>
struct SeenParams {
  AdditiveAttentionInput<S> in;
  bool* seen;  // [B, Tk] out
};

constexpr int kSeenEach = 4;  // keys a thread, which it writes at once

template <typename S>
LLM_EXT_SHARING_KERNEL(kThreads, 4)
void additive_seen(LLM_EXT_PARAMS SeenParams<S> p) {
  const int64_t first = (static_cast<int64_t>(block_x()) * kThreads + thread_index()) * kSeenEach;
  if (first >= p.in.batch * p.in.keys) return;
  Pack<bool, kSeenEach> seen = {};
#pragma unroll
  for (int i = 0; i < kSeenEach; ++i) {
    const int64_t b = (first + i) / p.in.keys, k = (first + i) % p.in.keys;
    for (int64_t q = 0; b < p.in.batch && q < p.in.queries && !seen.at[i]; ++q) {
      seen.at[i] = p.in.mask[b * p.in.mask_batch_stride + q * p.in.mask_query_stride + k];
    }
  }
  *reinterpret_cast<Pack<bool, kSeenEach>*>(p.seen + first) = seen;
}

// ---- softmax, a warp a query

template <typename S>
struct SoftmaxParams {
  int64_t batch, queries, keys;
  int64_t first, count;  // the queries of the slab
  Compute<S>* scores;    // [B, count, Tk] in; out: the weights, or backward the gradients of the scores
  Compute<S>* lse;       // [B, Tq] out; backward: in
  S* weights;            // [B, Tq, Tk] out; null: not wanted
  // Backward:
  bool has_gradients;     // whether the next one holds any
  Compute<S>* gradients;  // [B, count, Tk] in: of the weights, through the context; out: the weights
  const S* grad_weights;  // [B, Tq, Tk] of the weights themselves; null: zeros
};

// The query of this warp, and where its rows are.
struct SoftmaxRow {
  bool exists;
  int64_t in_slab, overall;

  LLM_EXT_DEVICE SoftmaxRow(int64_t batch, int64_t queries, int64_t first, int64_t count) {
    in_slab = static_cast<int64_t>(block_x()) * kWarps + warp_index();
    exists = in_slab < batch * count;
    overall = exists ? in_slab / count * queries + first + in_slab % count : 0;
  }
};

template <typename T>
LLM_EXT_DEVICE T warp_sum(T sum) {
#pragma unroll
  for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

template <typename S>
LLM_EXT_SHARING_KERNEL(kThreads, 4)
void additive_softmax(LLM_EXT_PARAMS SoftmaxParams<S> p) {
  using T = Compute<S>;
  const SoftmaxRow row(p.batch, p.queries, p.first, p.count);
  if (!row.exists) return;
  T* scores = p.scores + row.in_slab * p.keys;
  T max = kNone<T>;
  const auto rise_to = [&](T x) { max = x > max || x != x ? x : max; };
  for (int64_t k = lane_index(); k < p.keys; k += kWarpThreads) rise_to(scores[k]);
#pragma unroll
  for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) rise_to(shuffle_xor(max, mask));
  T sum = T(0);
  for (int64_t k = lane_index(); k < p.keys; k += kWarpThreads) {
    const T weight = scores[k] == kNone<T> ? T(0) : exp_of(scores[k] - max);
    scores[k] = weight;
    sum += weight;
  }
  sum = warp_sum(sum);
  const bool empty = max == kNone<T>;
  const T scale = empty ? T(0) : T(1) / sum;
  for (int64_t k = lane_index(); k < p.keys; k += kWarpThreads) {
    const T weight = scores[k] * scale;
    scores[k] = weight;
    if (p.weights != nullptr) p.weights[row.overall * p.keys + k] = narrow<S>(weight);
  }
  if (lane_index() == 0) p.lse[row.overall] = empty ? max : max + log_of(sum);
}

// ds = weight (g - sum of weight g).
template <typename S>
LLM_EXT_SHARING_KERNEL(kThreads, 4)
void additive_softmax_backward(LLM_EXT_PARAMS SoftmaxParams<S> p) {
  using T = Compute<S>;
  const SoftmaxRow row(p.batch, p.queries, p.first, p.count);
  if (!row.exists) return;
  T* scores = p.scores + row.in_slab * p.keys;
  T* gradients = p.gradients + row.in_slab * p.keys;
  const S* grad_weights = p.grad_weights == nullptr ? nullptr : p.grad_weights + row.overall * p.keys;
  const T lse = p.lse[row.overall];
  const auto weight_of = [&](int64_t k) { return scores[k] == kNone<T> ? T(0) : exp_of(scores[k] - lse); };
  // Where a key has no weight its value may be anything.
  const auto gradient_of = [&](int64_t k) {
    T g = p.has_gradients ? gradients[k] : T(0);
    if (grad_weights != nullptr) g += widen(grad_weights[k]);
    return g;
  };
  T common = T(0);
  for (int64_t k = lane_index(); k < p.keys; k += kWarpThreads) {
    const T weight = weight_of(k);
    if (weight != T(0)) common += weight * gradient_of(k);
  }
  common = warp_sum(common);
  for (int64_t k = lane_index(); k < p.keys; k += kWarpThreads) {
    const T weight = weight_of(k);
    scores[k] = weight != T(0) ? weight * (gradient_of(k) - common) : T(0);
    gradients[k] = weight;
  }
}

// ---- results that several slabs add up to

template <typename S>
struct Sums {
  S* out;
  Compute<S>* so_far;  // of the slabs before, as many elements; null exactly where there is one slab
  int64_t batch;       // stride of both in elements
  bool first, last;    // of the slabs

  LLM_EXT_DEVICE void add(int64_t b, int64_t place_in_row, Compute<S> value) const {
    const int64_t place = b * batch + place_in_row;
    if (!first) value += so_far[place];
    if (last) {
      out[place] = narrow<S>(value);
    } else {
      so_far[place] = value;
    }
  }
};

// ---- products of the weights or their gradients with the values or theirs

template <typename S>
struct Matrix {
  const S* data;
  int64_t batch, row, column;  // strides in elements
};

// z [B, M, N] = x [B, M, K] y [B, K, N].
template <typename X, typename Y, typename Z>
struct ProductParams {
  Matrix<X> x;
  Matrix<Y> y;
  int64_t M, N, K;
  const int64_t* lengths;  // [B] rows of y from there on may be anything, and count as 0; null: all are there
  const bool* seen;        // [B, K] likewise
  Sums<Z> z;
  int64_t row_tiles, column_tiles;
};

constexpr int kProductColumns = 64, kProductDepth = 16;

// A thread has kM rows and 4 columns of a tile.
template <typename X, typename Y, typename Z, int kM>
LLM_EXT_SHARING_KERNEL(kThreads, 2)
void additive_product(LLM_EXT_PARAMS ProductParams<X, Y, Z> p) {
  using T = Compute<Z>;
  constexpr int kRows = 16 * kM, kRowStride = kRows + 4, kColumnStride = kProductColumns + 4;
  T* x_tile = reinterpret_cast<T*>(shared_memory());
  T* y_tile = x_tile + kProductDepth * kRowStride;
  const int64_t b = block_x() / (p.row_tiles * p.column_tiles), tile = block_x() % (p.row_tiles * p.column_tiles);
  const int64_t m0 = tile / p.column_tiles * kRows, n0 = tile % p.column_tiles * kProductColumns;
  const int m = thread_index() / 16 * kM, n = thread_index() % 16 * 4;
  T sums[kM][4] = {};
  for (int64_t k0 = 0; k0 < p.K; k0 += kProductDepth) {
    // Neighbouring threads read what lies side by side.
    for (int i = thread_index(); i < kRows * kProductDepth; i += kThreads) {
      const int k = p.x.column == 1 ? i % kProductDepth : i / kRows,
                row = p.x.column == 1 ? i / kProductDepth : i % kRows;
      const bool there = m0 + row < p.M && k0 + k < p.K;
      x_tile[k * kRowStride + row] =
          there ? widen(p.x.data[b * p.x.batch + (m0 + row) * p.x.row + (k0 + k) * p.x.column]) : T(0);
    }
    for (int i = thread_index(); i < kProductColumns * kProductDepth; i += kThreads) {
      const int k = p.y.column == 1 ? i / kProductColumns : i % kProductDepth;
      const int column = p.y.column == 1 ? i % kProductColumns : i / kProductDepth;
      const bool there = n0 + column < p.N && k0 + k < p.K && (p.lengths == nullptr || k0 + k < p.lengths[b]) &&
                         (p.seen == nullptr || p.seen[b * p.K + k0 + k]);
      y_tile[k * kColumnStride + column] =
          there ? widen(p.y.data[b * p.y.batch + (k0 + k) * p.y.row + (n0 + column) * p.y.column]) : T(0);
    }
    block_barrier();
#pragma unroll
    for (int k = 0; k < kProductDepth; ++k) {
      T x[kM], y[4];
      read(x_tile + k * kRowStride + m, x);
      read(y_tile + k * kColumnStride + n, y);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += x[i] * y[j];
      }
    }
    block_barrier();
  }
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = m0 + m + i, column = n0 + n + j;
      if (row < p.M && column < p.N) p.z.add(b, row * p.N + column, sums[i][j]);
    }
  }
}

// ---- gradients of the queries, or of the keys; of the former also that of v

// A block owns some of their rows and kChunk numbers of each, and goes through all rows of the others, the keys or the
// queries. A warp has kOwn rows, a lane two numbers of each; warps that have the same rows share the others.
template <int kOwn_, int kGroups_>
struct GradientTile {
  static constexpr int kOwn = kOwn_, kGroups = kGroups_;
  static constexpr int kRows = kOwn * kGroups, kSlices = kWarps / kGroups;
};
using ManyRows = GradientTile<4, 8>;
using FewRows = GradientTile<4, 2>;
using OneRow = GradientTile<1, 1>;
constexpr int kOthers = 32;  // rows of the others in shared memory

template <typename S>
struct GradientParams {
  Rows<S> own, others;
  const S* v;
  int64_t attn_dim;
  int64_t own_first, own_end, others_first, others_end;
  const Compute<S>* ds;                // gradients of the scores of these
  int64_t ds_batch, ds_own, ds_other;  // strides
  Sums<S> out;                         // [B, own.count, A]
  Compute<S>* dv;                      // [parts, A] out, a part a tile of rows; null: not wanted
  int64_t first_tile, all_tiles;       // of the rows of b: the first of this launch, and how many there are in all
  int64_t tiles, chunks;
};

template <typename Tile>
constexpr int kGradientNumbers =
    larger(kOthers * (kStride + Tile::kRows), (Tile::kSlices * Tile::kRows + kWarps) * kChunk);

template <typename S, typename Tile>
LLM_EXT_SHARING_KERNEL(kThreads, (std::is_same_v<S, double> ? 1 : 2))
void additive_gradients(LLM_EXT_PARAMS GradientParams<S> p) {
  using T = Compute<S>;
  constexpr int kOwn = Tile::kOwn;
  const int64_t b = block_x() / (p.tiles * p.chunks), tile = block_x() / p.chunks % p.tiles;
  const int64_t begin = block_x() % p.chunks * kChunk, first = p.own_first + tile * Tile::kRows;
  const int group = warp_index() % Tile::kGroups, slice = warp_index() / Tile::kGroups;
  T* numbers = reinterpret_cast<T*>(shared_memory());
  T* rows = numbers;
  T* ds = rows + kOthers * kStride;
  int* flags = reinterpret_cast<int*>(numbers + kGradientNumbers<Tile>);

  T x[kOwn][2], e[kOwn][2];
  bool large = false;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int64_t row = first + group * kOwn + i, a = begin + 2 * lane_index() + n;
      const bool there = a < p.attn_dim && row < p.own_end && p.own.has(b, row);
      x[i][n] = there ? widen(p.own.data[(b * p.own.count + row) * p.attn_dim + a]) : T(0);
      large |= is_large(x[i][n]);
      e[i][n] = is_large(x[i][n]) ? T(1) : exact_exp_of(2 * x[i][n]);
    }
  }

  // Sums over the others of ds r (1 - r), of ds r and of ds.
  T d_own[kOwn][2] = {}, d_v[2] = {}, d_all = T(0);
  const bool works = first + group * kOwn < p.own_end;  // the whole warp
  const auto add_rows = [&](auto exact, int count) {
#pragma unroll 2
    for (int other = slice; works && other < count; other += Tile::kSlices) {
      T there[2], d[kOwn];
      read(rows + other * kStride + 2 * lane_index(), there);
      read(ds + other * Tile::kRows + group * kOwn, d);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        T r[2];
        if constexpr (decltype(exact)::value) {
          r[0] = exact_r(x[i][0] + there[0]);
          r[1] = exact_r(x[i][1] + there[1]);
        } else {
          const T one = T(1) + e[i][0] * there[0], two = T(1) + e[i][1] * there[1];
          const T inverse = reciprocal(one * two);
          r[0] = two * inverse;
          r[1] = one * inverse;
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          d_own[i][n] += d[i] * (r[n] - r[n] * r[n]);
          d_v[n] += d[i] * r[n];
        }
        d_all += d[i];
      }
    }
  };
  for (int64_t other = p.others_first; other < p.others_end; other += kOthers) {
    Staged<S, kOthers> staged;
    bool exact = staged.load(p.others, b, other, p.others_end, begin, p.attn_dim) || large;
    exact = any_of_block(exact, flags);
    staged.store(rows, exact);
    for (int i = thread_index(); i < kOthers * Tile::kRows; i += kThreads) {
      const int of_own = p.ds_own == 1 ? i % Tile::kRows : i / kOthers;
      const int of_others = p.ds_own == 1 ? i / Tile::kRows : i % kOthers;
      const bool there = first + of_own < p.own_end && other + of_others < p.others_end;
      ds[of_others * Tile::kRows + of_own] = there ? p.ds[b * p.ds_batch + (first - p.own_first + of_own) * p.ds_own +
                                                          (other - p.others_first + of_others) * p.ds_other]
                                                   : T(0);
    }
    block_barrier();
    const int count = static_cast<int>(p.others_end - other < kOthers ? p.others_end - other : kOthers);
    if (std::is_same_v<T, double> || exact) {
      add_rows(std::true_type{}, count);
    } else {
      add_rows(std::false_type{}, count);
    }
  }

  block_barrier();
  T* v_parts = numbers + Tile::kSlices * Tile::kRows * kChunk;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int a = 2 * lane_index() + n;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      numbers[(slice * Tile::kRows + group * kOwn + i) * kChunk + a] = d_own[i][n];
    }
    v_parts[warp_index() * kChunk + a] = d_all - 2 * d_v[n];
  }
  block_barrier();
  for (int i = thread_index(); i < Tile::kRows * kChunk; i += kThreads) {
    const int64_t row = first + i / kChunk, a = begin + i % kChunk;
    if (row >= p.own_end || a >= p.attn_dim) continue;
    T sum = T(0);
#pragma unroll
    for (int s = 0; s < Tile::kSlices; ++s) sum += numbers[s * Tile::kRows * kChunk + i];
    if (p.out.out != nullptr) p.out.add(b, row * p.attn_dim + a, 4 * widen(p.v[a]) * sum);
  }
  if (p.dv != nullptr && thread_index() < kChunk && begin + thread_index() < p.attn_dim) {
    T sum = T(0);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += v_parts[w * kChunk + thread_index()];
    p.dv[(b * p.all_tiles + p.first_tile + tile) * p.attn_dim + begin + thread_index()] = sum;
  }
}

// ---- launches

template <typename Params>
int launch_blocks(void (*kernel)(Params), const Params& params, int64_t blocks, size_t shared_bytes, void* stream) {
  if (blocks == 0) return 0;
  LaunchShape shape;
  shape.grid_x = static_cast<unsigned>(blocks);
  shape.threads = kThreads;
  shape.shared_bytes = shared_bytes;
  return launch(kernel, shape, params, stream);
}

int64_t tiles_of(int64_t count, int64_t tile) { return (count + tile - 1) / tile; }

// An op as a queue of kernels: each step is queued unless one before it failed.
template <typename S>
class Attention {
 public:
  using T = Compute<S>;

  Attention(const AdditiveAttentionInput<S>& in, bool* seen, void* stream) : in_(in), stream_(stream) {
    keys_ = {in.key, in.keys, in.key_lengths, in.mask};
    if (in.mask != nullptr && in.mask_query_stride != 0) {
      keys_.seen = seen;
      queue(additive_seen<S>, SeenParams<S>{in, seen}, tiles_of(in.batch * in.keys, kThreads * kSeenEach), 0);
    }
  }

  void scores(int64_t first, int64_t count, T* to) {
    switch (additive_rows(in_.queries)) {
      case ManyPairs::kQueries:
        return scores_by<ManyPairs>(first, count, to);
      case FewPairs::kQueries:
        return scores_by<FewPairs>(first, count, to);
      default:
        return scores_by<OneQuery>(first, count, to);
    }
  }

  void softmax(void (*kernel)(SoftmaxParams<S>), const SoftmaxParams<S>& params) {
    queue(kernel, params, tiles_of(params.batch * params.count, kWarps), 0);
  }

  template <typename X, typename Y, typename Z>
  void product(ProductParams<X, Y, Z> p) {
    const bool few = p.M <= 16;
    p.row_tiles = tiles_of(p.M, few ? 16 : 64);
    p.column_tiles = tiles_of(p.N, kProductColumns);
    const int64_t numbers = kProductDepth * ((few ? 16 : 64) + 4 + kProductColumns + 4);
    queue(few ? additive_product<X, Y, Z, 1> : additive_product<X, Y, Z, 4>, p,
          in_.batch * p.row_tiles * p.column_tiles, numbers * sizeof(T));
  }

  void gradients(const GradientParams<S>& p) {
    switch (additive_rows(p.own.count)) {
      case ManyRows::kRows:
        return gradients_by<ManyRows>(p);
      case FewRows::kRows:
        return gradients_by<FewRows>(p);
      default:
        return gradients_by<OneRow>(p);
    }
  }

  void add(const Parts<S>& parts) {
    if (error_ == 0) error_ = add_parts(parts, stream_);
  }

  const Rows<S>& keys() const { return keys_; }
  int error() const { return error_; }

 private:
  template <typename Params>
  void queue(void (*kernel)(Params), const Params& params, int64_t blocks, size_t shared_bytes) {
    if (error_ == 0) error_ = launch_blocks(kernel, params, blocks, shared_bytes, stream_);
  }

  template <typename Tile>
  void scores_by(int64_t first, int64_t count, T* to) {
    const ScoreParams<S> p = {
        in_, keys_, first, count, tiles_of(count, Tile::kQueries), tiles_of(in_.keys, Tile::kKeys), to};
    queue(additive_scores<S, Tile>, p, in_.batch * p.query_tiles * p.key_tiles,
          kScoreNumbers<T, Tile> * sizeof(T) + kWarps * sizeof(int));
  }

  template <typename Tile>
  void gradients_by(GradientParams<S> p) {
    p.attn_dim = in_.attn_dim;
    p.v = in_.v;
    p.first_tile = p.own_first / Tile::kRows;
    p.all_tiles = tiles_of(p.own.count, Tile::kRows);
    p.tiles = tiles_of(p.own_end - p.own_first, Tile::kRows);
    p.chunks = tiles_of(in_.attn_dim, kChunk);
    queue(additive_gradients<S, Tile>, p, in_.batch * p.tiles * p.chunks,
          kGradientNumbers<Tile> * sizeof(T) + kWarps * sizeof(int));
  }

  const AdditiveAttentionInput<S>& in_;
  void* stream_;
  Rows<S> keys_;
  int error_ = 0;
};

// The context: weights times values.
template <typename S>
ProductParams<Compute<S>, S, S> context_product(const AdditiveAttentionForwardParams<S>& p, const Rows<S>& keys,
                                                const Compute<S>* weights, int64_t first, int64_t count) {
  const AdditiveAttentionInput<S>& in = p.in;
  ProductParams<Compute<S>, S, S> product = {};
  product.x = {weights, count * in.keys, in.keys, 1};
  product.y = {in.values, in.keys * in.value_dim, in.value_dim, 1};
  product.M = count;
  product.N = in.value_dim;
  product.K = in.keys;
  product.lengths = keys.lengths;
  product.seen = keys.seen;
  product.z = {p.context + first * in.value_dim, nullptr, in.queries * in.value_dim, true, true};
  return product;
}
}  // namespace

template <typename S>
int additive_attention_forward(const AdditiveAttentionForwardParams<S>& p, int64_t slab, void* stream) {
  const AdditiveAttentionInput<S>& in = p.in;
  const AdditiveWorkspace<S> workspace(in, slab, false, p.workspace);
  Attention<S> attention(in, workspace.seen, stream);
  for (int64_t first = 0; first < in.queries; first += slab) {
    const int64_t count = first + slab < in.queries ? slab : in.queries - first;
    attention.scores(first, count, workspace.scores);
    SoftmaxParams<S> softmax = {};
    softmax.batch = in.batch;
    softmax.queries = in.queries;
    softmax.keys = in.keys;
    softmax.first = first;
    softmax.count = count;
    softmax.scores = workspace.scores;
    softmax.lse = p.lse;
    softmax.weights = p.weights;
    attention.softmax(additive_softmax<S>, softmax);
    attention.product(context_product(p, attention.keys(), workspace.scores, first, count));
  }
  return attention.error();
}

template <typename S>
int additive_attention_backward(const AdditiveAttentionBackwardParams<S>& p, int64_t slab, void* stream) {
  using T = Compute<S>;
  const AdditiveAttentionInput<S>& in = p.in;
  const AdditiveWorkspace<S> workspace(in, slab, true, p.workspace);
  Attention<S> attention(in, workspace.seen, stream);
  const Rows<S> queries = {in.query, in.queries, nullptr, nullptr};
  int64_t first = 0;
  // Once at least: without queries, gradients of keys and values are 0.
  do {
    const int64_t count = first + slab < in.queries ? slab : in.queries - first;
    const Matrix<S> grad_context = {p.grad_context == nullptr ? nullptr : p.grad_context + first * in.value_dim,
                                    in.queries * in.value_dim, in.value_dim, 1};
    attention.scores(first, count, workspace.scores);
    if (p.grad_context != nullptr) {
      ProductParams<S, S, T> product = {};
      product.x = grad_context;
      product.y = {in.values, in.keys * in.value_dim, 1, in.value_dim};
      product.M = count;
      product.N = in.keys;
      product.K = in.value_dim;
      product.z = {workspace.gradients, nullptr, count * in.keys, true, true};
      attention.product(product);
    }
    SoftmaxParams<S> softmax = {};
    softmax.batch = in.batch;
    softmax.queries = in.queries;
    softmax.keys = in.keys;
    softmax.first = first;
    softmax.count = count;
    softmax.scores = workspace.scores;
    softmax.lse = const_cast<T*>(p.lse);
    softmax.has_gradients = p.grad_context != nullptr;
    softmax.gradients = workspace.gradients;
    softmax.grad_weights = p.grad_weights;
    attention.softmax(additive_softmax_backward<S>, softmax);

    GradientParams<S> gradients = {};
    gradients.ds = workspace.scores;
    gradients.ds_batch = count * in.keys;
    if (p.dquery != nullptr || p.dv != nullptr) {
      gradients.own = queries;
      gradients.others = attention.keys();
      gradients.own_first = first;
      gradients.own_end = first + count;
      gradients.others_first = 0;
      gradients.others_end = in.keys;
      gradients.ds_own = in.keys;
      gradients.ds_other = 1;
      gradients.out = {p.dquery, nullptr, in.queries * in.attn_dim, true, true};
      gradients.dv = p.dv == nullptr ? nullptr : workspace.dv;
      attention.gradients(gradients);
    }
    if (p.dkey != nullptr) {
      gradients.own = attention.keys();
      gradients.others = queries;
      gradients.own_first = 0;
      gradients.own_end = in.keys;
      gradients.others_first = first;
      gradients.others_end = first + count;
      gradients.ds_own = 1;
      gradients.ds_other = in.keys;
      gradients.out = {p.dkey, workspace.key_sums, in.keys * in.attn_dim, first == 0, first + count == in.queries};
      gradients.dv = nullptr;
      attention.gradients(gradients);
    }
    if (p.dvalues != nullptr) {
      ProductParams<T, S, S> product = {};
      product.x = {workspace.gradients, count * in.keys, 1, in.keys};
      product.y = grad_context;
      product.M = in.keys;
      product.N = in.value_dim;
      product.K = p.grad_context == nullptr ? 0 : count;
      product.z = {p.dvalues, workspace.value_sums, in.keys * in.value_dim, first == 0, first + count == in.queries};
      attention.product(product);
    }
    first += slab;
  } while (first < in.queries);
  if (p.dv != nullptr) {
    const int64_t rows = additive_rows(in.queries), tiles = (in.queries + rows - 1) / rows;
    attention.add(Parts<S>{1, in.batch * tiles, in.attn_dim, workspace.dv, nullptr, p.dv, nullptr});
  }
  return attention.error();
}

#define FOR(S)                                                                                       \
  template int additive_attention_forward(const AdditiveAttentionForwardParams<S>&, int64_t, void*); \
  template int additive_attention_backward(const AdditiveAttentionBackwardParams<S>&, int64_t, void*);
FOR(float)
FOR(double)
FOR(BFloat16)
FOR(Float16)
#undef FOR

}  // namespace cuda
}  // namespace llm_ext
