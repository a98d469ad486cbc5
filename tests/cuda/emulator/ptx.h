// The functions that translated PTX calls (tests/support/ptx.py). A function of an instruction has its name with its
// modifiers; types are those of the instruction, and registers hold bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "device.h"
#include "fibers.h"

namespace emulator::ptx {

// ---- registers

template <typename To, typename From>
inline __attribute__((always_inline)) To as(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (sizeof(To) == sizeof(From) && !std::is_same_v<To, bool> && !std::is_same_v<From, bool>) {
    return __builtin_bit_cast(To, x);
  } else {
    static_assert(std::is_integral_v<To> && std::is_integral_v<From>, "bits of another size must be integers");
    return static_cast<To>(x);
  }
}

// ---- memory

constexpr uint32_t kSharedBase = 4096;  // where shared memory begins in its own space; 0 would hide a missing address
constexpr uint32_t kRankBit = 24;       // in addresses of the cluster, above those of a block

inline unsigned char* pointer(uint64_t address) { return reinterpret_cast<unsigned char*>(address); }
inline unsigned char* shared(uint32_t address) {
  return position().shared + static_cast<int32_t>(address - kSharedBase);
}
inline uint64_t generic_of_shared(uint32_t address) { return reinterpret_cast<uint64_t>(shared(address)); }

template <typename T, int n>
struct alignas(sizeof(T) * n) Vector {
  T at[n];
};
// These are compiled into the caller, whose line a report of a race then has.
template <typename T>
inline __attribute__((always_inline)) T load(const unsigned char* from) {
  typedef T Aliased __attribute__((may_alias));
  return *reinterpret_cast<const Aliased*>(from);
}
template <typename T>
inline __attribute__((always_inline)) void store(unsigned char* to, T x) {
  typedef T Aliased __attribute__((may_alias));
  *reinterpret_cast<Aliased*>(to) = x;
}

// ---- integers

template <typename T>
using Unsigned = std::make_unsigned_t<T>;
template <typename T>
constexpr int kBits = 8 * sizeof(T);
template <typename T>
using Wide = std::conditional_t<std::is_signed_v<T>, std::conditional_t<sizeof(T) == 2, int32_t, int64_t>,
                                std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>>;
template <typename T>
using Widest = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;

// Integers wrap; floating-point numbers are rounded to nearest.
#define LLM_EXT_PTX_ARITHMETIC(name, operation)                                           \
  template <typename T>                                                                   \
  T name(T a, T b) {                                                                      \
    if constexpr (std::is_integral_v<T>) {                                                \
      return static_cast<T>(static_cast<uint64_t>(a) operation static_cast<uint64_t>(b)); \
    } else {                                                                              \
      return a operation b;                                                               \
    }                                                                                     \
  }
LLM_EXT_PTX_ARITHMETIC(add, +)
LLM_EXT_PTX_ARITHMETIC(sub, -)
LLM_EXT_PTX_ARITHMETIC(mul, *)
#undef LLM_EXT_PTX_ARITHMETIC
template <typename T>
T add_rn(T a, T b) {
  return a + b;
}

template <typename T>
T mul_lo(T a, T b) {
  return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}
template <typename T>
T mul_hi(T a, T b) {
  return static_cast<T>(static_cast<Widest<T>>(a) * b >> kBits<T>);
}
template <typename T>
Wide<T> mul_wide(T a, T b) {
  return static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b);
}
template <typename T>
T mad_lo(T a, T b, T c) {
  return add<T>(mul_lo<T>(a, b), c);
}
template <typename T>
T div(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  return b == static_cast<T>(-1) && std::is_signed_v<T> ? sub<T>(0, a) : static_cast<T>(a / b);
}
template <typename T>
T rem(T a, T b) {
  if (b == 0) return a;
  return b == static_cast<T>(-1) && std::is_signed_v<T> ? T(0) : static_cast<T>(a % b);
}
template <typename T>
T neg(T a) {
  if constexpr (std::is_integral_v<T>) {
    return sub<T>(0, a);
  } else {
    return -a;
  }
}
template <typename T>
T abs(T a) {
  if constexpr (std::is_integral_v<T>) {
    return a < 0 ? sub<T>(0, a) : a;
  } else {
    return std::fabs(a);
  }
}
template <typename T>
T min(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return std::min(a, b);
  } else {
    return std::fmin(a, b);
  }
}
template <typename T>
T max(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return std::max(a, b);
  } else {
    return std::fmax(a, b);
  }
}
template <typename T>
T and_(T a, T b) {
  return static_cast<T>(a & b);
}
template <typename T>
T or_(T a, T b) {
  return static_cast<T>(a | b);
}
template <typename T>
T xor_(T a, T b) {
  return static_cast<T>(a ^ b);
}
template <typename T>
T not_(T a) {
  if constexpr (std::is_same_v<T, bool>) {
    return !a;
  } else {
    return static_cast<T>(~a);
  }
}
template <typename T>
T shl(T a, uint32_t by) {
  return by >= kBits<T> ? T(0) : static_cast<T>(static_cast<Unsigned<T>>(a) << by);
}
template <typename T>
T shr(T a, uint32_t by) {
  return by >= kBits<T> ? static_cast<T>(a < 0 ? -1 : 0) : static_cast<T>(a >> by);
}
template <typename T>
T bfi(T field, T into, uint32_t from, uint32_t count) {
  from &= 255;
  count &= 255;
  T result = into;
  for (uint32_t i = 0; i < count && from + i < kBits<T>; ++i) {
    const T bit = T(1) << (from + i);
    result = field >> i & 1 ? result | bit : result & ~bit;
  }
  return result;
}
template <typename T>
T prmt(T a, T b, uint32_t selection) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = selection >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (which & 7) & 255;
    if (which & 8) byte = byte & 128 ? 255 : 0;  // its sign
    result |= byte << 8 * i;
  }
  return result;
}

// ---- floating point; approximations err as much as those of the device may

template <typename T>
T fma_rn(T a, T b, T c) {
  return std::fma(a, b, c);
}
// The largest float that is at most x, and the largest in size that is at most x in size. Sums of a product are exact
// in long double, but for bits far below those of a float.
inline float rounded_down(long double x) {
  const float found = static_cast<float>(x);
  return found > x ? std::nextafter(found, -HUGE_VALF) : found;
}
inline float rounded_to_zero(long double x) { return x < 0 ? -rounded_down(-x) : rounded_down(x); }
template <typename T>
T fma_rm(T a, T b, T c) {
  return rounded_down(static_cast<long double>(a) * b + c);
}
template <typename T>
T add_rz(T a, T b) {
  return rounded_to_zero(static_cast<long double>(a) + b);
}
template <typename T>
T div_rn(T a, T b) {
  return a / b;
}
template <typename T>
T div_approx(T a, T b) {
  return quotient_approximately(a, b);
}
template <typename T>
T rcp_rn(T a) {
  return 1 / a;
}
template <typename T>
T rcp_approx(T a) {
  return quotient_approximately(1, a);
}
// Only the first guess of a division, with 20 bits.
inline double rcp_approx_f64(double a) { return as<double>(as<uint64_t>(1 / a) & ~uint64_t{0xffffffff}); }
template <typename T>
T ex2_approx(T a) {
  return std::exp2(a);
}
template <typename T>
T copysign(T sign, T a) {
  return std::copysign(a, sign);
}

template <typename To, typename From>
To cvt(From x) {
  return static_cast<To>(x);
}
template <typename To, typename From>
To cvt_rn(From x) {
  return static_cast<To>(x);
}
// To 0 ... 1; NaN becomes 0.
template <typename To, typename From>
To cvt_sat(From x) {
  return std::fmin(std::fmax(x, From(0)), From(1));
}
template <typename To, typename From>
To cvt_rni(From x) {
  return static_cast<To>(std::nearbyint(x));
}
inline uint16_t cvt_rn_bf16_f32(float x) { return bfloat16_of(x); }
inline uint16_t cvt_rn_f16_f32(float x) { return float16_of(x); }
inline float cvt_f32_f16(uint16_t bits) { return float_of_float16(bits); }
inline uint32_t cvt_rna_tf32_f32(float x) { return bits_of(tf32_of(x)); }

// ---- comparisons; those that end in u hold if a number is NaN

#define LLM_EXT_PTX_COMPARISON(name, operation) \
  template <typename T>                         \
  bool name(T a, T b) {                         \
    return a operation b;                       \
  }                                             \
  template <typename T>                         \
  bool name##u(T a, T b) {                      \
    return a != a || b != b || (a operation b); \
  }
LLM_EXT_PTX_COMPARISON(lt, <)
LLM_EXT_PTX_COMPARISON(le, <=)
LLM_EXT_PTX_COMPARISON(gt, >)
LLM_EXT_PTX_COMPARISON(ge, >=)
LLM_EXT_PTX_COMPARISON(eq, ==)
#undef LLM_EXT_PTX_COMPARISON
template <typename T>
bool ne(T a, T b) {
  return a < b || a > b || (std::is_integral_v<T> && a != b);
}
template <typename T>
bool neu(T a, T b) {
  return a != b;
}
template <typename T>
bool nan(T a, T b) {
  return a != a || b != b;
}

// ---- warps, clusters, fragments

// The value of lane (lane ^ mask), of the whole warp.
inline uint32_t shfl_sync_bfly(uint32_t value, uint32_t mask, uint32_t clamp, uint32_t members, CallSite site) {
  if (clamp != 31 || members != ~0u) fault("an exchange of a part of the warp", site);
  const Slots slots = exchange(&value, sizeof value, site);
  std::memcpy(&value, slots[(position().index % kWarp) ^ mask], sizeof value);
  return value;
}

// The value of lane `lane`, of the whole warp.
inline uint32_t shfl_sync_idx(uint32_t value, uint32_t lane, uint32_t clamp, uint32_t members, CallSite site) {
  if (clamp != 31 || members != ~0u || lane >= kWarp) fault("an exchange of a part of the warp", site);
  const Slots slots = exchange(&value, sizeof value, site);
  std::memcpy(&value, slots[lane], sizeof value);
  return value;
}

inline uint32_t mapa(uint32_t address, uint32_t rank) { return address | (rank + 1) << kRankBit; }
inline void st_async(uint32_t to, const uint32_t (&words)[4], uint32_t mbarrier, CallSite site) {
  const uint32_t rank = to >> kRankBit, mask = (1u << kRankBit) - 1;
  if (rank == 0 || mbarrier >> kRankBit != rank) fault("data and mbarrier are not in the same other block", site);
  store_dsmem_async(shared(to & mask), words, shared(mbarrier & mask), static_cast<int>(rank) - 1, site);
}

}  // namespace emulator::ptx
