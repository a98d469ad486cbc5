// Gradients of the queries (with that of v), or of the keys.
#pragma once

#include <type_traits>

#include "cuda/attention/pairs.cuh"
#include "cuda/attention/products.cuh"
#include "cuda/device.cuh"

namespace llm_ext {
namespace cuda {
namespace {

// A block owns some rows and kChunk numbers of each, and loops over all rows of the others: the keys, or the queries. A
// warp has kOwn rows, a lane two numbers of each; warps with the same rows share the others.
template <int kOwn_, int kGroups_>
struct GradientTile {
  static constexpr int kOwn = kOwn_, kGroups = kGroups_;
  static constexpr int kRows = kOwn * kGroups, kSlices = kWarps / kGroups;
};
using ManyRows = GradientTile<4, 8>;
using FewRows = GradientTile<4, 2>;
constexpr int kOthers = 32;  // rows of the others in shared memory

template <typename S>
struct GradientParams {
  Rows<S> own, others;
  const S* v;
  int64_t attn_dim;
  int64_t own_first, own_end, others_first, others_end;
  const Compute<S>* ds;                // gradients of the scores of these pairs
  int64_t ds_batch, ds_own, ds_other;  // strides
  SlabSums<S> out;                     // [B, own.count, A]
  Compute<S>* dv;                      // [tiles, A] out: partial sums per tile of rows; null: not wanted
  int64_t first_tile, all_tiles;       // tiles of the rows of b: the first of this launch, and their total number
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

  // Sums over the others: ds r (1 - r), ds r, and ds.
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
  T* v_partial_sums = numbers + Tile::kSlices * Tile::kRows * kChunk;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int a = 2 * lane_index() + n;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      numbers[(slice * Tile::kRows + group * kOwn + i) * kChunk + a] = d_own[i][n];
    }
    v_partial_sums[warp_index() * kChunk + a] = d_all - 2 * d_v[n];
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
    for (int w = 0; w < kWarps; ++w) sum += v_partial_sums[w * kChunk + thread_index()];
    p.dv[(b * p.all_tiles + p.first_tile + tile) * p.attn_dim + begin + thread_index()] = sum;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace llm_ext
