// Products of weight and state tiles: 16-bit types and TF32 by matrix fragments, float32 by multiply-adds with the same
// distribution over lanes.
//
// Lane 4 r + q of a warp holds columns 4 q to 4 q + 3 of rows r and r + 8 of a weight tile [16, 16]. Of the product
// [16, 8] it receives rows r and r + 8 for states 2 q and 2 q + 1.
#pragma once

#include "cuda/device.cuh"
#include "cuda/rnn/tiles.h"

namespace llm_ext {
namespace cuda {

using Words = Pack<uint32_t, 4>;  // 16 bytes

// bfloat16 or float16: 2048 multiply-adds per instruction, sums in float.
template <typename S>
struct HalfArithmetic {
  using Stored = S;
  using Operand = S;
  static constexpr Type kType = Type::kBFloat16;
  static constexpr int kPacks = 1;  // 16-byte packs per lane and weight tile
  static constexpr int kSums = 4;   // partial sums per lane and tile before finish()

  LLM_EXT_DEVICE static Operand operand(float x) { return narrow<S>(x); }

  LLM_EXT_DEVICE static void pack(const Operand (&low)[4], const Operand (&high)[4], Words (&weights)[kPacks]) {
    weights[0].at[0] = low[0].bits | static_cast<uint32_t>(low[1].bits) << 16;
    weights[0].at[1] = high[0].bits | static_cast<uint32_t>(high[1].bits) << 16;
    weights[0].at[2] = low[2].bits | static_cast<uint32_t>(low[3].bits) << 16;
    weights[0].at[3] = high[2].bits | static_cast<uint32_t>(high[3].bits) << 16;
  }

  // Adds the products of `tiles` weight tiles with a state tile of `rows` rows.
  template <int tiles>
  LLM_EXT_DEVICE static void multiply(float (&sums)[tiles][kSums], const Words (&weights)[tiles][kPacks],
                                      const Operand* states, int stride, int /*rows*/) {
    const int r = lane_index() / 4, q = lane_index() % 4;
    const auto fragment = *reinterpret_cast<const Pack<uint32_t, 2>*>(states + r * stride + 4 * q);
#pragma unroll
    for (int t = 0; t < tiles; ++t) multiply_add(sums[t], weights[t][0], fragment, S{});
  }

  LLM_EXT_DEVICE static void finish(const float (&sums)[kSums], float (&own)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) own[i] = sums[i];
  }
};

// float, multiplied as TF32: weights and states are rounded to 10 mantissa bits.
struct Tf32Arithmetic {
  using Stored = float;
  using Operand = float;
  static constexpr Type kType = Type::kFloat32;
  static constexpr int kPacks = 2;
  static constexpr int kSums = 4;

  LLM_EXT_DEVICE static Operand operand(float x) { return round_to_tf32(x); }

  LLM_EXT_DEVICE static void pack(const Operand (&low)[4], const Operand (&high)[4], Words (&weights)[kPacks]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      weights[k / 2].at[k % 2 * 2] = bits_of(low[k]);
      weights[k / 2].at[k % 2 * 2 + 1] = bits_of(high[k]);
    }
  }

  template <int tiles>
  LLM_EXT_DEVICE static void multiply(float (&sums)[tiles][kSums], const Words (&weights)[tiles][kPacks],
                                      const Operand* states, int stride, int /*rows*/) {
    const int r = lane_index() / 4, q = lane_index() % 4;
    const auto fragment = *reinterpret_cast<const Words*>(states + r * stride + 4 * q);
#pragma unroll
    for (int t = 0; t < tiles; ++t) multiply_add_tf32(sums[t], weights[t][0], weights[t][1], fragment);
  }

  LLM_EXT_DEVICE static void finish(const float (&sums)[kSums], float (&own)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) own[i] = sums[i];
  }
};

// float, multiplied as float. A lane sums its own four columns for all states: 64 multiply-adds per 16 numbers read.
// finish() then distributes the sums over the four lanes that have the same rows.
struct FloatArithmetic {
  using Stored = float;
  using Operand = float;
  static constexpr Type kType = Type::kFloat32;
  static constexpr int kPacks = 2;
  static constexpr int kSums = 2 * kTileRows;  // [row r or r + 8][state]

  LLM_EXT_DEVICE static Operand operand(float x) { return x; }

  LLM_EXT_DEVICE static void pack(const Operand (&low)[4], const Operand (&high)[4], Words (&weights)[kPacks]) {
    Tf32Arithmetic::pack(low, high, weights);
  }

  template <int tiles>
  LLM_EXT_DEVICE static void multiply(float (&sums)[tiles][kSums], const Words (&weights)[tiles][kPacks],
                                      const Operand* states, int stride, int rows) {
    const Operand* at = states + 4 * (lane_index() % 4);
    // Two states at a time, without the unused ones: unlike with fragments, they would cost time.
#pragma unroll
    for (int n = 0; n < kTileRows; n += 2) {
      if (n >= rows) break;
      const auto first = *reinterpret_cast<const Pack<float, 4>*>(at + n * stride);
      const auto second = *reinterpret_cast<const Pack<float, 4>*>(at + (n + 1) * stride);
#pragma unroll
      for (int t = 0; t < tiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float weight = float_of(weights[t][k / 2].at[k % 2 * 2 + half]);
            sums[t][half * kTileRows + n] += weight * first.at[k];
            sums[t][half * kTileRows + n + 1] += weight * second.at[k];
          }
        }
      }
    }
  }

  LLM_EXT_DEVICE static void finish(const float (&sums)[kSums], float (&own)[4]) {
    // Lanes that differ in bit 1 of q exchange halves of the states; then lanes that differ in bit 0 do.
    const int q = lane_index() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* all = sums + half * kTileRows;
      float four[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float mine = q & 2 ? all[n + 4] : all[n];
        four[n] = mine + shuffle_xor(q & 2 ? all[n] : all[n + 4], 2);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float mine = q & 1 ? four[n + 2] : four[n];
        own[2 * half + n] = mine + shuffle_xor(q & 1 ? four[n] : four[n + 2], 1);
      }
    }
  }
};

}  // namespace cuda
}  // namespace llm_ext
