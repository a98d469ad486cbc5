// Compiled without ASan's instrumentation, for speed.
#include "device.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "scheduler.h"

namespace emulator {

Device device;

int run_on_device(const Launch& l) {
  // The numbers of cudaErrorInvalidValue, cudaErrorInvalidConfiguration and cudaErrorCooperativeLaunchTooLarge.
  if (static_cast<int64_t>(l.shared_bytes) > device.shared_bytes) return 1;
  if (l.threads % kWarp) fault("blocks must be whole warps");
  if (std::min({l.grid_x, l.grid_y, l.grid_z}) < 1 || l.threads == 0) return 9;
  if (l.threads > 1024 || l.grid_x > INT32_MAX || l.grid_y > 65535 || l.grid_z > 65535) return 9;
  if (l.cluster > (device.sm >= 90 ? 16u : 1u) || l.grid_x % l.cluster) return 9;
  // Kernels are compiled for one block a multiprocessor.
  if (l.all_resident && l.blocks() > static_cast<size_t>(device.sm_count)) return 720;
  run(l);
  return 0;
}

uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

namespace {

// From -1 to 1, by the bits of x.
float error_of(float x) { return static_cast<float>(static_cast<int32_t>(bits_of(x) * 2654435761u)) / 2147483648.0f; }

}  // namespace

float float_of_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

float float_of_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = bits >> 10 & 0x1f, fraction = bits & 0x3ff;
  if (exponent == 0x1f) return float_of(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * static_cast<float>(fraction);
  return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

uint16_t bfloat16_of(float x) {
  const uint32_t bits = bits_of(x);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t float16_of(float x) {
  const uint16_t sign = static_cast<uint16_t>(bits_of(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (size == 0) return sign;
  if (size >= 65520) return sign | 0x7c00;  // rounds to more than 65504
  int exponent;
  std::frexp(size, &exponent);  // size < 2^exponent
  // In units of the last of 11 bits, or of the smallest subnormal number; the default rounding is to even.
  const int unit = std::max(exponent - 11, -24);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
  return static_cast<uint16_t>(sign | (units + ((unit + 24) << 10)));
}

float tf32_of(float x) {
  if (!std::isfinite(x)) return x;
  return float_of((bits_of(x) + 0x1000) & ~0x1fffu);
}

float exp_approximately(float x) {
  if (std::isinf(x)) return std::exp(x);
  return std::exp(x) * (1 + (2e-7f + 1e-7f * std::fabs(x)) * error_of(x));
}

float quotient_approximately(float a, float b) {
  // __fdividef: beyond 2^126 the reciprocal is 0.
  if (std::fabs(b) > 0x1p126f) return a * 0.0f;
  return a / b * (1 + 1.2e-7f * error_of(a + b));
}

namespace {

// The registers of one lane: a, b and the sum.
struct Fragment {
  uint32_t a[4], b[2];
  float sum[4];
};

template <typename Multiply>
void together(float (&sum)[4], const Fragment& given, CallSite site, Multiply multiply) {
  const std::function<void(Slots)> last = [&](Slots slots) {
    Fragment fragments[kWarp];
    for (unsigned lane = 0; lane < kWarp; ++lane) memcpy(&fragments[lane], slots[lane], sizeof(Fragment));
    multiply(fragments);
    for (unsigned lane = 0; lane < kWarp; ++lane) memcpy(slots[lane], fragments[lane].sum, sizeof sum);
  };
  memcpy(sum, exchange(&given, sizeof given, site, last)[self().lane()], sizeof sum);
}

// sum [16, 8] += a [16, K] b [K, 8]; each lane holds (r, 2 q), (r, 2 q + 1), (r + 8, 2 q), (r + 8, 2 q + 1) of the sum.
template <int K>
void add_product(Fragment (&fragments)[kWarp], const float (&a)[16][K], const float (&b)[K][8]) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float total = fragments[lane].sum[i];
      for (int k = 0; k < K; ++k) total += a[row][k] * b[k][column];
      fragments[lane].sum[i] = total;
    }
}

}  // namespace

void mma_m16n8k16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*widen)(uint16_t),
                  CallSite site) {
  Fragment given;
  memcpy(given.a, a, sizeof a);
  memcpy(given.b, b, sizeof b);
  memcpy(given.sum, sum, sizeof sum);
  together(sum, given, site, [&](Fragment(&fragments)[kWarp]) {
    float wide_a[16][16], wide_b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int r = lane / 4, q = lane % 4;
      for (int half = 0; half < 2; ++half) {  // of a register: the lower one comes first
        const auto part = [&](uint32_t word) { return widen(static_cast<uint16_t>(word >> 16 * half)); };
        for (int i = 0; i < 4; ++i) wide_a[r + i % 2 * 8][2 * q + half + i / 2 * 8] = part(fragments[lane].a[i]);
        for (int i = 0; i < 2; ++i) wide_b[2 * q + half + i * 8][r] = part(fragments[lane].b[i]);
      }
    }
    add_product<16>(fragments, wide_a, wide_b);
  });
}

void mma_m16n8k8_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CallSite site) {
  Fragment given;
  memcpy(given.a, a, sizeof a);
  memcpy(given.b, b, sizeof b);
  memcpy(given.sum, sum, sizeof sum);
  together(sum, given, site, [&](Fragment(&fragments)[kWarp]) {
    float wide_a[16][8], wide_b[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int r = lane / 4, q = lane % 4;
      // The instruction does not look at the low 13 bits.
      const auto part = [](uint32_t bits) { return float_of(bits & ~0x1fffu); };
      for (int i = 0; i < 4; ++i) wide_a[r + i % 2 * 8][q + i / 2 * 4] = part(fragments[lane].a[i]);
      for (int i = 0; i < 2; ++i) wide_b[q + i * 4][r] = part(fragments[lane].b[i]);
    }
    add_product<8>(fragments, wide_a, wide_b);
  });
}

}  // namespace emulator
