// Products of int8 weights with int16 factors, and rounding of float rows to int16.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

typedef int16_t Int16Vec __attribute__((vector_size(LLM_EXT_VECTOR_BYTES)));

// Loads int8 weights, two per 32-bit lane, as int16.
static inline Int16Vec load_int8(const int8_t* p) {
#if LLM_EXT_VECTOR_BYTES == 64
  return (Int16Vec)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif LLM_EXT_VECTOR_BYTES == 32
  return (Int16Vec)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  typedef int8_t Bytes __attribute__((vector_size(LLM_EXT_VECTOR_BYTES / 2)));
  Bytes bytes;
  __builtin_memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, Int16Vec);
#endif
}

// The pair at p in every 32-bit lane.
static inline Int16Vec broadcast_pair(const int16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof(pair));
  return (Int16Vec)(pair - IntVec<float>{});
}

// sum + a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1] for each 32-bit lane i. The sum must not overflow.
static inline IntVec<float> add_pairs(IntVec<float> sum, Int16Vec a, Int16Vec b) {
#ifdef LLM_EXT_DOT_INT16
  return (IntVec<float>)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif LLM_EXT_VECTOR_BYTES == 64
  return sum + (IntVec<float>)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif LLM_EXT_VECTOR_BYTES == 32
  return sum + (IntVec<float>)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return sum + (IntVec<float>)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  for (int i = 0; i < kLanes<float>; ++i) sum[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sum;
#endif
}

// The largest magnitude of n numbers; a NaN counts as larger than infinity.
static inline float largest_magnitude(const float* x, int64_t n) {
  IntVec<float> most{};
  for_each_vector<float>(n, [&](int64_t i, int lanes) {
    // Magnitudes are ordered as their bits are, which an integer maximum does not lose to a NaN.
    const IntVec<float> bits = (IntVec<float>)load_partial(x + i, lanes) & 0x7fffffff;
    most = bits > most ? bits : most;
  });
  int32_t largest = 0;
  for (int i = 0; i < kLanes<float>; ++i) largest = most[i] > largest ? most[i] : largest;
  float result;
  __builtin_memcpy(&result, &largest, sizeof(result));
  return result;
}

// Rounds x * factor to nearest even. Results must be below 2^22 in magnitude.
static inline void round_to_int16(const float* x, int64_t n, float factor, int16_t* out) {
  typedef int16_t Half __attribute__((vector_size(LLM_EXT_VECTOR_BYTES / 2)));
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  for_each_vector<float>(n, [&](int64_t i, int lanes) {
    const Vec<float> shifted = load_partial(x + i, lanes) * factor + kRound;
    const Half rounded = __builtin_convertvector((IntVec<float>)shifted - (IntVec<float>)broadcast(kRound), Half);
    __builtin_memcpy(out + i, &rounded, lanes * sizeof(int16_t));
  });
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
