// Partial loads and stores, and copies, between the type in memory, S, and the type of arithmetic, Compute<S>.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/simd/float16.inl"
#include "cpu/simd/traits.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Loads or stores the first n lanes, 0 < n <= kLanes. Does not access memory beyond them; the other lanes load as zero.
template <typename S, typename T = Compute<S>>
static inline Vec<T> load_partial(const S* p, int n) {
  if (n == kLanes<T>) return load(p);
  if constexpr (kIsNarrow<S>) {
    Bits16 bits{};
    for (int i = 0; i < n; ++i) bits[i] = p[i].bits;
    return widen(bits, S{});
  } else {
#if LLM_EXT_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) {
      return (Vec<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
    } else {
      return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
    }
#else
    Vec<T> v{};
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
#endif
  }
}

template <typename S, typename T = Compute<S>>
static inline void store_partial(S* p, Vec<T> v, int n) {
  if constexpr (kIsNarrow<S>) {
    const Bits16 bits = narrow(v, S{});
    if (n == kLanes<T>) {
      __builtin_memcpy(p, &bits, sizeof(bits));
    } else {
      for (int i = 0; i < n; ++i) p[i].bits = bits[i];
    }
  } else {
    if (n == kLanes<T>) return store(p, v);
#if LLM_EXT_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) {
      _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
    } else {
      _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
    }
#else
    for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
  }
}

// Stores a whole vector of numbers that are representable as S, without rounding.
template <typename S>
static inline void store_exact(S* p, Vec<Compute<S>> v) {
  if constexpr (kSame<S, BFloat16>) {
    const Bits16 bits = __builtin_convertvector((Bits32)v >> 16, Bits16);
    __builtin_memcpy(p, &bits, sizeof(bits));
  } else {
    store_partial(p, v, kLanes<Compute<S>>);
  }
}

template <typename S>
static inline Compute<S> read(const S* p) {
  if constexpr (kIsNarrow<S>) {
    return load_partial(p, 1)[0];
  } else {
    return *p;
  }
}

// Copies n numbers, converting between types.
template <typename From, typename To>
static inline void convert(const From* from, To* to, int64_t n) {
  if constexpr (sizeof(From) == sizeof(To)) {
    __builtin_memcpy(to, from, n * sizeof(To));
  } else {
    for_each_vector<Compute<From>>(
        n, [&](int64_t i, int lanes) { store_partial(to + i, load_partial(from + i, lanes), lanes); });
  }
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
