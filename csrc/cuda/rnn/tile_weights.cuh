// A warp's slice of U, and its product with a tile of states.
#pragma once

#include "cuda/device.cuh"
#include "cuda/rnn/arithmetic.cuh"
#include "cuda/rnn/tiles.h"

namespace llm_ext {
namespace cuda {

template <typename Job>
struct Weights {
  using A = typename Job::Arithmetic;
  using Operand = typename A::Operand;
  static constexpr int kTiles = Job::kTiles;
  static constexpr int kHeld = held_tiles(Job::kPass) / kTiles;  // column tiles in registers
  // Consecutive mma on the same sum are dependent: with few tiles, two independent chains hide their latency.
  static constexpr int kChains = kTiles < 3 && A::kSums == 4 ? 2 : 1;

  Words held[kHeld][kTiles][A::kPacks];
  Words* shared;      // the warp's column tiles from kHeld on
  int first, count;   // the warp's column tiles
  int streamed_from;  // the first column tile that is read from the workspace; count if none is

  LLM_EXT_DEVICE static Words* slot(Words* all, int i, int t, int pack) {
    return all + ((i * kTiles + t) * A::kPacks + pack) * kWarpThreads + lane_index();
  }

  // Reads the lane's fragment of column tile i from U.
  LLM_EXT_DEVICE void read(const Job& job, int first_unit, int padded, int i, int t, Words (&words)[A::kPacks]) const {
    const int r = lane_index() / 4, q = lane_index() % 4;
    const int column = (first + i) * kTileColumns + 4 * q;
    const int block = column / padded;
    Operand low[4], high[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      low[k] = A::operand(job.weight(t, first_unit + 2 * r, block, column - block * padded + k));
      high[k] = A::operand(job.weight(t, first_unit + 2 * r + 1, block, column - block * padded + k));
    }
    A::pack(low, high, words);
  }

  LLM_EXT_DEVICE void fill(const Job& job, int first_unit, int padded, Words* streamed) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (i < count) read(job, first_unit, padded, i, t, held[i][t]);
      }
    }
#pragma unroll 1
    for (int i = kHeld; i < count; ++i) {
#pragma unroll 1
      for (int t = 0; t < kTiles; ++t) {
        Words words[A::kPacks];
        read(job, first_unit, padded, i, t, words);
        Words* to = i < streamed_from ? slot(shared, i - kHeld, t, 0) : slot(streamed, i - streamed_from, t, 0);
#pragma unroll
        for (int pack = 0; pack < A::kPacks; ++pack) to[pack * kWarpThreads] = words[pack];
      }
    }
  }

  // Adds the products of column tiles [begin, end), stored in `all`.
  LLM_EXT_DEVICE void add(const Words* all, int begin, int end, const Operand* states, int stride, int rows,
                          float (&sums)[kChains][kTiles][A::kSums]) const {
#pragma unroll 1
    for (int i = begin; i < end; i += kChains) {
#pragma unroll
      for (int chain = 0; chain < kChains; ++chain) {
        if (i + chain >= end) break;
        Words words[kTiles][A::kPacks];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int pack = 0; pack < A::kPacks; ++pack) {
            words[t][pack] = all[(((i - begin + chain) * kTiles + t) * A::kPacks + pack) * kWarpThreads + lane_index()];
          }
        }
        A::multiply(sums[chain], words, states + (i + chain) * kTileColumns, stride, rows);
      }
    }
  }

  // `streamed` returns the address of the column tiles in the workspace.
  template <typename Streamed>
  LLM_EXT_DEVICE void product(const Operand* states, int stride, int rows, Streamed streamed,
                              float (&own)[kTiles][4]) const {
    float sums[kChains][kTiles][A::kSums] = {};
    const Operand* at = states + first * kTileColumns;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i < count) A::multiply(sums[i % kChains], held[i], at + i * kTileColumns, stride, rows);
    }
    add(shared, kHeld, streamed_from, at, stride, rows, sums);
    if (streamed_from < count) add(streamed(), streamed_from, count, at, stride, rows, sums);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int chain = 1; chain < kChains; ++chain) {
#pragma unroll
        for (int n = 0; n < A::kSums; ++n) sums[0][t][n] += sums[chain][t][n];
      }
      A::finish(sums[0][t], own[t]);
    }
  }
};

}  // namespace cuda
}  // namespace llm_ext
