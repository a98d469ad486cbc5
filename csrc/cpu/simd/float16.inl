// bfloat16 and float16 vectors: widened to float when loaded, rounded to nearest even when stored. Pairs of bfloat16
// for vdpbf16ps.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Integer vectors with as many lanes as Vec<float>.
typedef uint16_t Bits16 __attribute__((vector_size(LLM_EXT_VECTOR_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(LLM_EXT_VECTOR_BYTES)));

// A bfloat16 is the upper half of a float.
static inline Vec<float> widen(Bits16 bits, BFloat16) {
#if LLM_EXT_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#elif LLM_EXT_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
#else
  return (Vec<float>)(__builtin_convertvector(bits, Bits32) << 16);
#endif
}

static inline Bits16 narrow(Vec<float> v, BFloat16) {
  const Bits32 u = (Bits32)v;
  const Bits32 rounded = u + 0x7fffu + ((u >> 16) & 1u);  // to nearest even; may carry into infinity
  const Bits32 quiet = u | 0x400000u;                     // a NaN: rounding could carry it into another value
  return __builtin_convertvector((v == v ? rounded : quiet) >> 16, Bits16);
}

// A float16 is an IEEE half: 5 bits of exponent, 10 of fraction.
static inline Vec<float> widen(Bits16 bits, Float16) {
#if LLM_EXT_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtph_ps((__m256i)bits);
#elif LLM_EXT_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps((__m128i)bits);
#else
  const Bits32 u = __builtin_convertvector(bits, Bits32);
  const Bits32 sign = (u & 0x8000u) << 16;
  const Bits32 magnitude = (u & 0x7fffu) << 13;
  const Bits32 normal = magnitude + (112u << 23);
  const Bits32 special = magnitude + (224u << 23);  // infinity and NaN
  const Bits32 smallest = Bits32{} + (113u << 23);  // 2^-14, the smallest normal
  const Bits32 subnormal = (Bits32)((Vec<float>)(magnitude + smallest) - (Vec<float>)smallest);
  const Bits32 finite = magnitude < (1u << 23) ? subnormal : normal;
  return (Vec<float>)((magnitude >= (31u << 23) ? special : finite) | sign);
#endif
}

static inline Bits16 narrow(Vec<float> v, Float16) {
#if LLM_EXT_VECTOR_BYTES == 64
  return (Bits16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif LLM_EXT_VECTOR_BYTES == 32
  return (Bits16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const Bits32 u = (Bits32)v;
  const Bits32 magnitude = u & 0x7fffffffu;
  // To nearest even; carries into infinity from 65520 on.
  const Bits32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits32 half = Bits32{} + (126u << 23);  // 0.5: its last bit is 2^-24, as that of a subnormal
  const Bits32 subnormal = (Bits32)((Vec<float>)magnitude + (Vec<float>)half) - half;
  const Bits32 finite = magnitude < (113u << 23) ? subnormal : normal;
  const Bits32 special = magnitude > (255u << 23) ? Bits32{} + 0x7e00u : Bits32{} + 0x7c00u;
  return __builtin_convertvector((magnitude >= (143u << 23) ? special : finite) | ((u >> 16) & 0x8000u), Bits16);
#endif
}

template <typename S>
constexpr bool kIsNarrow = sizeof(S) == 2;

template <typename S>
static inline auto load_narrow(const S* p) {
  Bits16 bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return widen(bits, S{});
}
static inline Vec<float> load(const BFloat16* p) { return load_narrow(p); }
static inline Vec<float> load(const Float16* p) { return load_narrow(p); }

// Whether the ISA has vdpbf16ps, which multiplies pairs of bfloat16 and adds the products to a float.
#ifdef LLM_EXT_DOT_BF16
constexpr bool kHasDotPairs = true;
#else
constexpr bool kHasDotPairs = false;
#endif

// Loads pairs of bfloat16, one per 32-bit lane, the first number in the lower half. 0 < numbers <= 2 kLanes; the rest
// is zero. Registers hold pairs as Vec<float>.
static inline Vec<float> load_pairs(const BFloat16* p, int numbers) {
  Vec<float> pairs{};
  if (numbers == 2 * kLanes<float>) {
    __builtin_memcpy(&pairs, p, sizeof(pairs));
  } else {
    __builtin_memcpy(&pairs, p, numbers * sizeof(BFloat16));
  }
  return pairs;
}

// Pairs from two vectors of floats that are representable as bfloat16.
static inline Vec<float> make_pairs(Vec<float> first, Vec<float> second) {
  return (Vec<float>)(((Bits32)first >> 16) | (Bits32)second);
}

#ifdef LLM_EXT_DOT_BF16
// Adds to each lane of `sum` the products of its pair in `pairs` with the pair at `left`, which has one number or two.
// Treats subnormal numbers as zero.
static inline Vec<float> dot_pairs(Vec<float> sum, const BFloat16* left, int numbers, const BFloat16* pairs) {
  uint32_t both = 0;
  __builtin_memcpy(&both, left, numbers * sizeof(BFloat16));
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(both)),
                                      (__m512bh)_mm512_loadu_si512(pairs));
}
#endif

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
