// The thread team of one call. Kernels receive a ThreadTeam and never start threads.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

namespace llm_ext {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}
inline void yield() {
#if defined(__unix__) || defined(__APPLE__)
  sched_yield();
#endif
}

// Reusable barrier for a fixed number of running threads.
//
// Waiting threads spin, because the steps of a recurrence are microseconds apart, and yield when the spin budget is
// used up: then some thread of the team has no core. A timed-out wait halves the budget of the call's later waits
// (back-off), since that thread will have no core at the next step either.
class Barrier {
 public:
  void wait(int size) {
    if (size == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    const int budget = spin_budget_.load(std::memory_order_relaxed);
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < budget) {
        pause();
      } else {
        if (spins == budget && budget > kMinSpins) {
          spin_budget_.store(budget / 2, std::memory_order_relaxed);
        }
        yield();
      }
    }
  }

 private:
  static constexpr int kMaxSpins = 4096;  // 50 to 100 us: longer than any step if every thread has a core
  static constexpr int kMinSpins = 32;

  // On separate cache lines: some threads poll the phase while others still arrive.
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::atomic<int> spin_budget_{kMaxSpins};
};

// A counter that one thread advances and others wait for.
class Progress {
 public:
  void reach(int64_t count) { count_.store(count, std::memory_order_release); }

  void await(int64_t count) const {
    for (int spins = 0; count_.load(std::memory_order_acquire) < count; ++spins) {
      spins < kMaxSpins ? pause() : yield();
    }
  }

 private:
  static constexpr int kMaxSpins = 4096;

  alignas(64) std::atomic<int64_t> count_{0};
};

// The half-open range [begin, end).
struct Range {
  int64_t begin;
  int64_t end;
  int64_t size() const { return end - begin; }
};

// The team as one of its threads sees it. All `size` threads are running.
struct ThreadTeam {
  int rank;
  int size;
  Barrier* barrier;

  void sync() const { barrier->wait(size); }

  // This thread's slice of [0, n), cut at multiples of `unit` and as even as possible.
  Range slice(int64_t n, int64_t unit = 1) const {
    const int64_t units = (n + unit - 1) / unit;
    const int64_t begin = units * rank / size * unit;
    const int64_t end = units * (rank + 1) / size * unit;
    return {begin < n ? begin : n, end < n ? end : n};
  }
};

}  // namespace llm_ext
