// Vectors of the level: LLM_EXT_VECTOR_BYTES wide, with the compiler's own operators. Numbers of 16 bits become float32
// when they are loaded, and are rounded to the nearest when they are stored.
namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Of the standard library's, no header of which may stand in a region of a level.
template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;
template <bool first, typename A, typename B>
struct Choice {
  using type = A;
};
template <typename A, typename B>
struct Choice<false, A, B> {
  using type = B;
};
template <bool first, typename A, typename B>
using Choose = typename Choice<first, A, B>::type;

// A number that a type stands for.
template <int n>
struct Constant {
  static constexpr int value = n;
};

template <typename T>
struct VecType;
template <>
struct VecType<float> {
  typedef float type __attribute__((vector_size(LLM_EXT_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(LLM_EXT_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(LLM_EXT_VECTOR_BYTES)));
};
template <>
struct VecType<double> {
  typedef double type __attribute__((vector_size(LLM_EXT_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(LLM_EXT_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t integer __attribute__((vector_size(LLM_EXT_VECTOR_BYTES)));
};

template <typename T>
using Vec = typename VecType<T>::type;
template <typename T>
using IntVec = typename VecType<T>::integer;

template <typename T>
constexpr int kLanes = LLM_EXT_VECTOR_BYTES / static_cast<int>(sizeof(T));

// As many numbers of 16 bits, and of 32, as there are floats in a vector.
typedef uint16_t Bits16 __attribute__((vector_size(LLM_EXT_VECTOR_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(LLM_EXT_VECTOR_BYTES)));

template <typename T>
static inline T infinity() {
  return T(__builtin_inf());
}

template <typename T>
static inline Vec<T> broadcast(T s) {
  return s - Vec<T>{};  // s - 0 is s, to the sign of zero and the NaN
}

template <typename T>
static inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecType<T>::unaligned*>(p);
}

template <typename T>
static inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecType<T>::unaligned*>(p) = v;
}

// Of the 16 bits of a bfloat16, the upper half of a float32.
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
  const Bits32 rounded = u + 0x7fffu + ((u >> 16) & 1u);  // to the nearest, ties to even; may carry into infinity
  const Bits32 quiet = u | 0x400000u;                     // rounding could carry a NaN out of its range
  return __builtin_convertvector((v == v ? rounded : quiet) >> 16, Bits16);
}

// Of the 16 bits of an IEEE half: 5 of exponent, 10 of fraction.
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
  const Bits32 least = Bits32{} + (113u << 23);     // 2^-14: a subnormal is a fraction of it
  const Bits32 subnormal = (Bits32)((Vec<float>)(magnitude + least) - (Vec<float>)least);
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
  // To the nearest, ties to even; carries into infinity from 65520 on.
  const Bits32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits32 half = Bits32{} + (126u << 23);  // 0.5: its last bit is 2^-24, that of a subnormal
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

// Whether an instruction multiplies pairs of bfloat16.
#ifdef LLM_EXT_DOT_BF16
constexpr bool kHasDot = true;
#else
constexpr bool kHasDot = false;
#endif

// Pairs of bfloat16, one in each lane of 32 bits, the first in its lower half. They pass through registers as floats.
static inline Vec<float> load_pairs(const BFloat16* p, int numbers) {  // 0 < numbers <= 2 kLanes, the others zero
  Vec<float> pairs{};
  if (numbers == 2 * kLanes<float>) {
    __builtin_memcpy(&pairs, p, sizeof(pairs));
  } else {
    __builtin_memcpy(&pairs, p, numbers * sizeof(BFloat16));
  }
  return pairs;
}

// Of numbers that are bfloat16.
static inline Vec<float> make_pairs(Vec<float> first, Vec<float> second) {
  return (Vec<float>)(((Bits32)first >> 16) | (Bits32)second);
}

#ifdef LLM_EXT_DOT_BF16
// To each lane the products of both halves of its pair with those of `left`, of which there are two or only the first.
// Subnormal numbers count as zero.
static inline Vec<float> dot(Vec<float> sum, const BFloat16* left, int numbers, const BFloat16* pairs) {
  uint32_t both = 0;
  __builtin_memcpy(&both, left, numbers * sizeof(BFloat16));
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(both)),
                                      (__m512bh)_mm512_loadu_si512(pairs));
}
#endif

// The first n lanes, 0 < n <= kLanes; the others read as zero and are not touched in memory.
template <typename S, typename T = Compute<S>>
static inline Vec<T> load_part(const S* p, int n) {
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
static inline void store_part(S* p, Vec<T> v, int n) {
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

// A whole vector of numbers that S holds exactly.
template <typename S>
static inline void store_exact(S* p, Vec<Compute<S>> v) {
  if constexpr (kSame<S, BFloat16>) {
    const Bits16 bits = __builtin_convertvector((Bits32)v >> 16, Bits16);
    __builtin_memcpy(p, &bits, sizeof(bits));
  } else {
    store_part(p, v, kLanes<Compute<S>>);
  }
}

// One number.
template <typename S>
static inline Compute<S> read(const S* p) {
  if constexpr (kIsNarrow<S>) {
    return load_part(p, 1)[0];
  } else {
    return *p;
  }
}

// Sum of the lanes, always in the same order: halves upon each other.
template <typename T>
static inline T sum_lanes(Vec<T> v) {
#if LLM_EXT_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    return _mm512_reduce_add_ps((__m512)v);
  } else {
    return _mm512_reduce_add_pd((__m512d)v);
  }
#elif LLM_EXT_VECTOR_BYTES == 32
  // Through shuffles, without the detour through memory.
  if constexpr (sizeof(T) == 4) {
    const __m128 half = _mm256_castps256_ps128((__m256)v) + _mm256_extractf128_ps((__m256)v, 1);
    const __m128 quarter = half + _mm_movehl_ps(half, half);
    return quarter[0] + quarter[1];
  } else {
    const __m128d half = _mm256_castpd256_pd128((__m256d)v) + _mm256_extractf128_pd((__m256d)v, 1);
    return half[0] + half[1];
  }
#else
  T part[kLanes<T>];
  store(part, v);
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
#endif
}

// The first lanes of a and b in turn, and their last lanes in turn.
template <typename T>
static inline void interleave(Vec<T> a, Vec<T> b, Vec<T>& low, Vec<T>& high) {
  if constexpr (kLanes<T> == 2) {
    low = Vec<T>{a[0], b[0]};
    high = Vec<T>{a[1], b[1]};
  } else if constexpr (kLanes<T> == 4) {
    low = Vec<T>{a[0], b[0], a[1], b[1]};
    high = Vec<T>{a[2], b[2], a[3], b[3]};
  } else if constexpr (kLanes<T> == 8) {
    low = Vec<T>{a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]};
    high = Vec<T>{a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]};
  } else {
    low = Vec<T>{a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3], a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]};
    high = Vec<T>{a[8],  b[8],  a[9],  b[9],  a[10], b[10], a[11], b[11],
                  a[12], b[12], a[13], b[13], a[14], b[14], a[15], b[15]};
  }
}

// The lanes at even places, and after them those at odd ones: what interleaving has mixed.
template <typename T>
static inline Vec<T> separate(Vec<T> v) {
  if constexpr (kLanes<T> == 2) {
    return v;
  } else if constexpr (kLanes<T> == 4) {
    return Vec<T>{v[0], v[2], v[1], v[3]};
  } else if constexpr (kLanes<T> == 8) {
    return Vec<T>{v[0], v[2], v[4], v[6], v[1], v[3], v[5], v[7]};
  } else {
    return Vec<T>{v[0], v[2], v[4], v[6], v[8], v[10], v[12], v[14], v[1], v[3], v[5], v[7], v[9], v[11], v[13], v[15]};
  }
}

// Transposes the square of kLanes vectors: rows that are half the square apart, interleaved, as often as it can be
// halved.
template <typename T>
static inline void transpose(Vec<T> (&square)[kLanes<T>]) {
  constexpr int kHalf = kLanes<T> / 2;
#pragma GCC unroll 4
  for (int n = kLanes<T>; n > 1; n /= 2) {
    Vec<T> next[kLanes<T>];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) interleave<T>(square[i], square[i + kHalf], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) square[i] = next[i];
  }
}

// Sums the lanes of kCount vectors, a power of two up to kLanes, until one vector holds what is left of all: lane l has
// to do with v[l % kCount]. Halves upon each other, as sum_lanes; with kCount = kLanes it is done.
template <typename T, int kCount>
static inline Vec<T> sum_halves(Vec<T>* v) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) {
      Vec<T> low, high;
      interleave<T>(v[i], v[i + kCount / 2], low, high);
      v[i] = low + high;
    }
    return sum_halves<T, kCount / 2>(v);
  }
}

// Walks over [0, n) in whole vectors and one part: body(offset, lanes).
template <typename T, typename Body>
static inline void for_each_vector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) body(i, kLanes<T>);
  if (i < n) body(i, static_cast<int>(n - i));
}

// Asks for the line of memory that begins at row + d, if one does: for loops over d that want what comes after the row.
template <typename S>
static inline void prefetch(const S* row, int64_t d) {
  if (d % (64 / static_cast<int64_t>(sizeof(S))) == 0) __builtin_prefetch(row + d);
}

// Copies n numbers, into another type if the pointers say so.
template <typename From, typename To>
static inline void convert(const From* from, To* to, int64_t n) {
  if constexpr (sizeof(From) == sizeof(To)) {
    __builtin_memcpy(to, from, n * sizeof(To));
  } else {
    for_each_vector<Compute<From>>(
        n, [&](int64_t i, int lanes) { store_part(to + i, load_part(from + i, lanes), lanes); });
  }
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
