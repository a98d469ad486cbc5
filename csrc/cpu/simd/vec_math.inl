// exp, sigmoid and tanh of vectors; scalar exp and log. The errors were measured against long double over the whole
// range. NaN stays NaN.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

template <typename T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kLog2E = 1.44269504088896341f;
  static constexpr float kLn2Hi = 0.693359375f;  // few bits, so that n * kLn2Hi is exact
  static constexpr float kLn2Lo = -2.12194440054690583e-4f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  static constexpr float kMax = 88.3f;          // exp overflows to inf just above
  static constexpr float kMin = -87.3f;         // smallest normal result
  static constexpr int kMantissaBits = 23;
  static constexpr int kDegree = 7;  // Taylor: remainder 6e-9 at ln2 / 2
};
template <>
struct ExpConstants<double> {
  static constexpr double kLog2E = 1.44269504088896340736;
  static constexpr double kLn2Hi = 6.93147180369123816490e-01;
  static constexpr double kLn2Lo = 1.90821492927058770002e-10;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kMax = 709.4;
  static constexpr double kMin = -708.3;
  static constexpr int kMantissaBits = 52;
  static constexpr int kDegree = 13;  // Taylor: remainder 4e-18 at ln2 / 2
};

// 1 / k! for k up to 13.
template <typename T>
static constexpr T kInverseFactorial[] = {T(1),
                                          T(1),
                                          T(0.5),
                                          T(1.66666666666666666667e-01),
                                          T(4.16666666666666666667e-02),
                                          T(8.33333333333333333333e-03),
                                          T(1.38888888888888888889e-03),
                                          T(1.98412698412698412698e-04),
                                          T(2.48015873015873015873e-05),
                                          T(2.75573192239858906526e-06),
                                          T(2.75573192239858906526e-07),
                                          T(2.50521083854417187751e-08),
                                          T(2.08767569878680989792e-09),
                                          T(1.60590438368216145994e-10)};

// Splits x = n ln2 + r, |r| <= ln2 / 2, into 2^n and expm1(r). x must be in [kMin, kMax].
template <typename T>
static inline void exp_split(Vec<T> x, Vec<T>* scale, Vec<T>* expm1_r) {
  using C = ExpConstants<T>;
  const Vec<T> shifted = x * C::kLog2E + C::kRound;
  const Vec<T> n = shifted - C::kRound;
  const Vec<T> r = (x - n * C::kLn2Hi) - n * C::kLn2Lo;
  Vec<T> p = broadcast(kInverseFactorial<T>[C::kDegree]);
#pragma GCC unroll 16
  for (int k = C::kDegree - 1; k >= 1; --k) p = p * r + kInverseFactorial<T>[k];
  *expm1_r = p * r;
  *scale = (Vec<T>)(((IntVec<T>)shifted << C::kMantissaBits) + (IntVec<T>)broadcast(T(1)));
}

// exp(x): 0 below kMin, inf above kMax. Relative error: float 1.2e-7, double 2.3e-16.
template <typename T>
static inline Vec<T> vec_exp(Vec<T> x) {
  using C = ExpConstants<T>;
  Vec<T> scale, p;
  exp_split<T>(x, &scale, &p);
  Vec<T> result = scale * p + scale;
  result = x < C::kMin ? Vec<T>{} : result;
  return x > C::kMax ? broadcast(T(__builtin_inf())) : result;
}

// 1 / x for 1 <= x < inf. Relative error: float 1.2e-7, double half a unit in the last place.
template <typename T>
static inline Vec<T> reciprocal(Vec<T> x) {
#if LLM_EXT_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    // An estimate of 14 bits and one Newton step.
    const Vec<T> guess = (Vec<T>)_mm512_rcp14_ps((__m512)x);
    return guess + guess * (T(1) - x * guess);
  }
#endif
  return T(1) / x;
}

// 1 / (1 + exp(-x)): 0 where exp(-x) is inf. Relative error where the result is normal: float 1.5e-7, double 2.8e-16.
template <typename T>
static inline Vec<T> vec_sigmoid(Vec<T> x) {
  return T(1) / (T(1) + vec_exp<T>(-x));
}

// tanh(x). Relative error: float 3e-7 (without fused multiply-add 3.6e-7), double 4.2e-16.
template <typename T>
static inline Vec<T> vec_tanh(Vec<T> x) {
  if constexpr (sizeof(T) == 4) {
    // x P(x^2) / Q(x^2), a minimax fit of the relative error on |x| <= 7.91 (5.7e-9 before rounding). Beyond, tanh is
    // within 2.8e-7 of 1. It has half the operations and the latency of the form with exp.
    constexpr float kClamp = 7.91f;
    x = x > kClamp ? broadcast(kClamp) : x;
    x = x < -kClamp ? broadcast(-kClamp) : x;
    const Vec<T> y = x * x;
    Vec<T> p = y * 1.5408448077424017e-8f + 2.2010607532402482e-5f;
    Vec<T> q = y * 8.5912592159752765e-7f + 3.4224381183486759e-4f;
    p = p * y + 3.5782674990007407e-3f;
    q = q * y + 2.6189516140544143e-2f;
    p = p * y + 1.3450021178834871e-1f;
    q = q * y + 4.6783349118211935e-1f;
    p = p * y + 0.99999999428631413f;
    q = q * y + 1.0f;
    return x * p / q;
  } else {
    // expm1(2x) / (expm1(2x) + 2): no cancellation near 0. Beyond 20 the result rounds to 1.
    constexpr double kClamp = 20.0;
    x = x > kClamp ? broadcast(kClamp) : x;
    x = x < -kClamp ? broadcast(-kClamp) : x;
    Vec<T> scale, p;
    exp_split<T>(x + x, &scale, &p);
    const Vec<T> expm1 = scale * p + (scale - 1.0);
    return expm1 / (expm1 + 2.0);
  }
}

template <typename T>
static inline T scalar_exp(T x) {
  if constexpr (sizeof(T) == 4) return __builtin_expf(x);
  return __builtin_exp(x);
}
template <typename T>
static inline T scalar_log(T x) {
  if constexpr (sizeof(T) == 4) return __builtin_logf(x);
  return __builtin_log(x);
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
