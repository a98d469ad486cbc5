// The threads that work on one call. Kernels are handed a ThreadTeam and never start a thread themselves.
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

// What a waiting thread does: little, or give the core away.
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

// Reusable barrier for a known number of running threads. Spins, because the steps of a recurrence are microseconds
// apart, and gives the core away when the wait grows long: then some thread of the team has no core. It will have none
// at the next step either, so whoever waited in vain makes the next waits shorter.
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
    const int patience = patience_.load(std::memory_order_relaxed);
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < patience) {
        pause();
      } else {
        if (spins == patience && patience > kLeastSpins) {
          patience_.store(patience / 2, std::memory_order_relaxed);
        }
        yield();
      }
    }
  }

 private:
  static constexpr int kMostSpins = 4096;  // some 50 to 100 us: longer than any step in which all threads have a core
  static constexpr int kLeastSpins = 32;

  // Apart from each other: waiters read the phase while others still arrive.
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::atomic<int> patience_{kMostSpins};
};

// How far one thread has come, for others to wait for.
class Progress {
 public:
  void reach(int64_t place) { place_.store(place, std::memory_order_release); }

  void await(int64_t place) const {
    for (int spins = 0; place_.load(std::memory_order_acquire) < place; ++spins) {
      spins < kMostSpins ? pause() : yield();
    }
  }

 private:
  static constexpr int kMostSpins = 4096;

  alignas(64) std::atomic<int64_t> place_{0};
};

struct Range {
  int64_t begin;
  int64_t end;
  int64_t size() const { return end - begin; }
};

// One thread's view of the team it belongs to. All `size` threads are known to run.
struct ThreadTeam {
  int rank;
  int size;
  Barrier* barrier;

  void sync() const { barrier->wait(size); }

  // This thread's share of n items dealt out in whole units, as even as can be.
  Range share(int64_t n, int64_t unit = 1) const { return share_of(rank, n, unit); }

  Range share_of(int who, int64_t n, int64_t unit = 1) const {
    const int64_t units = (n + unit - 1) / unit;
    const int64_t begin = units * who / size * unit;
    const int64_t end = units * (who + 1) / size * unit;
    return {begin < n ? begin : n, end < n ? end : n};
  }
};

}  // namespace llm_ext
