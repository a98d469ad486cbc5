// Vectors of the level: LLM_EXT_VECTOR_BYTES wide, with the compiler's own operators.
namespace llm_ext {
namespace LLM_EXT_LEVEL {

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

// The first n lanes, 0 < n <= kLanes; the others read as zero and are not touched in memory.
template <typename T>
static inline Vec<T> load_part(const T* p, int n) {
  if (n == kLanes<T>) return load(p);
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

template <typename T>
static inline void store_part(T* p, Vec<T> v, int n) {
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

// Walks over [0, n) in whole vectors and one part: body(offset, lanes).
template <typename T, typename Body>
static inline void for_each_vector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) body(i, kLanes<T>);
  if (i < n) body(i, static_cast<int>(n - i));
}

}  // namespace LLM_EXT_LEVEL
}  // namespace llm_ext
