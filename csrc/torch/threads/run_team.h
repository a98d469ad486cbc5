// CPU only: runs kernels on the threads of torch's OpenMP pool.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/thread_team.h"
#include "torch/stable.h"
#include "torch/threads/usable_cores.h"

namespace llm_ext {

inline int max_threads() {
#ifdef _OPENMP
  return static_cast<int>(torch::stable::get_num_threads());
#else
  return 1;
#endif
}

// `wanted`, or the usable cores if they are fewer: at every barrier the team would wait for a thread without a core.
inline int team_size(int wanted) {
  if (wanted <= 1) return 1;
  const int cores = usable_cores();
  return cores > 0 && cores < wanted ? cores : wanted;
}

// Runs kernel(team) on at most `threads` threads, and returns when all have finished. The team has as many threads as
// OpenMP delivered, because a barrier must not wait for a thread that never started.
//
// The parallel region has the size of torch's pool, and surplus threads return at once: libgomp ends the threads that a
// smaller region leaves out, and torch's next op would have to start them again (docs/lab/threads.md).
template <typename Kernel>
void run_team(int threads, const Kernel& kernel) {
  Barrier barrier;
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(max_threads())
    {
      const int size = threads < omp_get_num_threads() ? threads : omp_get_num_threads();
      const int rank = omp_get_thread_num();
      if (rank < size) kernel(ThreadTeam{rank, size, &barrier});
    }
    return;
  }
#endif
  (void)threads;
  kernel(ThreadTeam{0, 1, &barrier});
}

}  // namespace llm_ext
