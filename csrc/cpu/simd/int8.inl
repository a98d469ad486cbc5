// Products of int8 weights with int16 factors and with bytes, and rounding of float rows to both.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/vec.inl"
#include "cpu/simd/vec_math.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

typedef int16_t Int16Vec __attribute__((vector_size(LLM_EXT_VECTOR_BYTES)));
typedef uint16_t Uint16Vec __attribute__((vector_size(LLM_EXT_VECTOR_BYTES)));

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

// The four bytes at p in every 32-bit lane.
static inline IntVec<float> broadcast_lane(const void* p) {
  int32_t lane;
  __builtin_memcpy(&lane, p, sizeof(lane));
  return lane - IntVec<float>{};
}

// sum + a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1] for each 32-bit lane i. The sum must not overflow.
static inline IntVec<float> add_pairs(IntVec<float> sum, Int16Vec a, Int16Vec b) {
#if defined(LLM_EXT_VNNI) && LLM_EXT_VECTOR_BYTES == 64
  return (IntVec<float>)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(LLM_EXT_VNNI)
  return (IntVec<float>)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
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

// sum + the products of the four bytes of each 32-bit lane: those of a are unsigned and at most 127, those of b are
// from -127 to 127, so that the sum of two products fits into int16.
static inline IntVec<float> add_fours(IntVec<float> sum, IntVec<float> a, IntVec<float> b) {
#if defined(LLM_EXT_VNNI) && LLM_EXT_VECTOR_BYTES == 64
  return (IntVec<float>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(LLM_EXT_VNNI)
  return (IntVec<float>)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif LLM_EXT_VECTOR_BYTES == 64
  return add_pairs(sum, (Int16Vec)_mm512_maddubs_epi16((__m512i)a, (__m512i)b), Int16Vec{} + 1);
#elif LLM_EXT_VECTOR_BYTES == 32
  return add_pairs(sum, (Int16Vec)_mm256_maddubs_epi16((__m256i)a, (__m256i)b), Int16Vec{} + 1);
#else
  // Bytes 0 and 2 of each lane, then 1 and 3, as int16.
  const Int16Vec even = (Int16Vec)((Uint16Vec)a & 0xff), odd = (Int16Vec)((Uint16Vec)a >> 8);
  return add_pairs(add_pairs(sum, even, (Int16Vec)((Uint16Vec)b << 8) >> 8), odd, (Int16Vec)b >> 8);
#endif
}

static inline int32_t largest_lane(IntVec<float> v) {
#if LLM_EXT_VECTOR_BYTES == 64
  return _mm512_reduce_max_epi32((__m512i)v);
#elif LLM_EXT_VECTOR_BYTES == 32
  const __m128i half = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  const __m128i quarter = _mm_max_epi32(half, _mm_unpackhi_epi64(half, half));
  return _mm_cvtsi128_si32(_mm_max_epi32(quarter, _mm_srli_epi64(quarter, 32)));
#else
  int32_t largest = v[0];
  for (int i = 1; i < kLanes<float>; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
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
  const int32_t largest = largest_lane(most);
  float result;
  __builtin_memcpy(&result, &largest, sizeof(result));
  return result;
}

// Rounds x * inverse_scale, which must fit into int16.
static inline void round_to_int16(const float* x, int64_t n, float inverse_scale, int16_t* out) {
  typedef int16_t Half __attribute__((vector_size(LLM_EXT_VECTOR_BYTES / 2)));
  for_each_vector<float>(n, [&](int64_t i, int lanes) {
    const Vec<float> shifted = load_partial(x + i, lanes) * inverse_scale + ExpConstants<float>::kRound;
    const Half rounded =
        __builtin_convertvector((IntVec<float>)shifted - (IntVec<float>)broadcast(ExpConstants<float>::kRound), Half);
    __builtin_memcpy(out + i, &rounded, lanes * sizeof(int16_t));
  });
}

typedef uint8_t LowBytes __attribute__((vector_size(LLM_EXT_VECTOR_BYTES / 4)));

// The low byte of each lane. The compiler would convert lane by lane.
static inline LowBytes low_bytes(IntVec<float> v) {
#if LLM_EXT_VECTOR_BYTES == 64
  return (LowBytes)_mm512_cvtepi32_epi8((__m512i)v);
#elif LLM_EXT_VECTOR_BYTES == 32
  const __m256i fours = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi32(0x0c080400));
  const __m128i bytes = _mm_unpacklo_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  return (LowBytes)_mm_cvtsi128_si64(bytes);
#elif defined(__SSE2__)
  const __m128i words = _mm_packs_epi32((__m128i)(v & 0xff), _mm_setzero_si128());
  return (LowBytes)_mm_cvtsi128_si32(_mm_packus_epi16(words, words));
#else
  return __builtin_convertvector(v, LowBytes);
#endif
}

// Rounds x * inverse_scale and adds `offset`; the results must be bytes.
static inline void round_to_bytes(const float* x, int64_t n, float inverse_scale, int offset, uint8_t* out) {
  const float shift = ExpConstants<float>::kRound + static_cast<float>(offset);
  for_each_vector<float>(n, [&](int64_t i, int lanes) {
    const LowBytes bytes = low_bytes((IntVec<float>)(load_partial(x + i, lanes) * inverse_scale + shift));
    __builtin_memcpy(out + i, &bytes, lanes);
  });
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
