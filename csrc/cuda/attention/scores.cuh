// Scores of a slab of queries, and the keys that any query attends to.
#pragma once

#include <type_traits>

#include "cuda/attention/pairs.cuh"
#include "cuda/device.cuh"

namespace llm_ext {
namespace cuda {
namespace {

template <typename S>
struct ScoreParams {
  AdditiveAttentionInput<S> in;
  Rows<S> keys;
  int64_t first, count;  // the queries of the slab
  int64_t query_tiles, key_tiles;
  Compute<S>* scores;  // [B, count, Tk] out: -inf for masked keys
};

template <typename T, typename Tile>
constexpr int kScoreNumbers =
    larger((Tile::kQueries + Tile::kKeys) * kStride + kChunk, Tile::kSlices* Tile::kQueries* Tile::kKeys);

// The exponentials of float64 need more registers.
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

  // The thread's rows that exist in this tile: nothing is computed beyond the last query and key.
  const auto rows_of = [](int64_t left, int step, int most) {
    const int64_t used = (left + step - 1) / step;
    return static_cast<int>(used < most ? used : most);
  };
  const int q_used = rows_of(end - q0, Tile::kQueryStep, kQ), k_used = rows_of(in.keys - k0, Tile::kKeyStep, kK);

  // The thread's partial sums of v . tanh = sum of v - 2 sum of v r.
  T v_sum = T(0), vr[kQ][kK] = {};
  const auto add_chunk = [&](auto exact, auto whole) {
#pragma unroll 1
    for (int pack_index = slice; pack_index < kChunk / kPackSize<T>; pack_index += Tile::kSlices) {
      T v[kPackSize<T>], k[kK][kPackSize<T>];
      read(v_row + pack_index * kPackSize<T>, v);
#pragma unroll
      for (int n = 0; n < kPackSize<T>; ++n) v_sum += v[n];
#pragma unroll
      for (int j = 0; j < kK; ++j)
        read(k_rows + (of_keys + j * Tile::kKeyStep) * kStride + pack_index * kPackSize<T>, k[j]);
#pragma unroll
      for (int i = 0; i < kQ; ++i) {
        if (!decltype(whole)::value && i >= q_used) continue;
        T q[kPackSize<T>];
        read(q_rows + (of_queries + i * Tile::kQueryStep) * kStride + pack_index * kPackSize<T>, q);
#pragma unroll
        for (int j = 0; j < kK; ++j) {
          if (!decltype(whole)::value && j >= k_used) continue;
#pragma unroll
          for (int n = 0; n < kPackSize<T>; n += 2) {
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
    const bool attended = (in.key_lengths == nullptr || k < in.key_lengths[b]) &&
                          (in.mask == nullptr || in.mask[b * in.mask_batch_stride + q * in.mask_query_stride + k]);
    p.scores[(b * p.count + q - p.first) * in.keys + k] = attended ? score : kMinusInfinity<T>;
  }
}

// With a mask per query: which keys any query attends to.
template <typename S>
struct SeenParams {
  AdditiveAttentionInput<S> in;
  bool* seen;  // [B, Tk] out
};

constexpr int kSeenEach = 4;  // keys per thread, written at once

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

}  // namespace
}  // namespace cuda
}  // namespace llm_ext
