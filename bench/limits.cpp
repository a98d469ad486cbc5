// What the cores of this machine can do at best. bench/limits.py compiles it for the machine it runs on; each function
// returns the mean of what it computed, so that no compiler leaves the work out, and so that it can be checked.

#include <omp.h>

#if defined(__AVX512F__)
constexpr int kBytes = 64, kChains = 24;  // 32 registers
#elif defined(__AVX__)
constexpr int kBytes = 32, kChains = 12;  // 16 registers
#else
constexpr int kBytes = 16, kChains = 12;
#endif
constexpr int kLanes = kBytes / sizeof(float);
constexpr int kReads = 8;
typedef float Vector __attribute__((vector_size(kBytes), may_alias));

static double total(const Vector* vectors, int count) {
  double sum = 0;
  for (int i = 0; i < count; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) sum += vectors[i][lane];
  }
  return sum;
}

extern "C" long flops_of_round() { return 2L * kLanes * kChains; }

// In every thread kChains chains x = a x + b of so many rounds: enough to hide the latency of one. They start at
// different numbers, of mean 0: of equal chains the compiler would compute one.
extern "C" double multiply_add(long rounds, float a, float b, int threads) {
  double sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
  {
    Vector x[kChains];
    for (int i = 0; i < kChains; ++i) x[i] = Vector{} + (i - 0.5f * (kChains - 1));
    for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
      for (int i = 0; i < kChains; ++i) x[i] = x[i] * a + b;
    }
    sum += total(x, kChains);
  }
  return sum / (double(threads) * kChains * kLanes);
}

extern "C" long floats_of_group() { return long(kReads) * kLanes; }

// Every thread reads its own share of the groups, so many times over.
extern "C" double read(const float* data, long groups_of_thread, long passes, int threads) {
  double sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
  {
    const long first = omp_get_thread_num() * groups_of_thread * kReads;
    const Vector* own = reinterpret_cast<const Vector*>(data) + first;
    Vector sums[kReads] = {};
    for (long pass = 0; pass < passes; ++pass) {
      for (long group = 0; group < groups_of_thread; ++group) {
#pragma GCC unroll 8
        for (int i = 0; i < kReads; ++i) sums[i] += own[group * kReads + i];
      }
    }
    sum += total(sums, kReads);
  }
  return sum / (double(threads) * groups_of_thread * kReads * kLanes * passes);
}
