// Peak multiply-adds and reads of this machine's cores. bench/limits.py compiles this file for the machine it runs on.
// Each function returns the mean of its results: the compiler cannot drop the work, and the caller can check it.

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

extern "C" long flops_per_round() { return 2L * kLanes * kChains; }

// Every thread runs kChains independent chains x = a x + b, enough to hide the latency of one. They start at different
// values with mean 0, because the compiler would merge equal chains.
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

extern "C" long floats_per_group() { return long(kReads) * kLanes; }

// Every thread reads its own range of groups, `passes` times.
extern "C" double read(const float* data, long groups_per_thread, long passes, int threads) {
  double sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
  {
    const long first = omp_get_thread_num() * groups_per_thread * kReads;
    const Vector* own = reinterpret_cast<const Vector*>(data) + first;
    Vector sums[kReads] = {};
    for (long pass = 0; pass < passes; ++pass) {
      for (long group = 0; group < groups_per_thread; ++group) {
#pragma GCC unroll 8
        for (int i = 0; i < kReads; ++i) sums[i] += own[group * kReads + i];
      }
    }
    sum += total(sums, kReads);
  }
  return sum / (double(threads) * groups_per_thread * kReads * kLanes * passes);
}
