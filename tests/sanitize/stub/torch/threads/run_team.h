// Replaces csrc/torch/threads/run_team.h: a team of std::thread, which ThreadSanitizer understands. It takes the
// barriers of OpenMP's runtime for races.
#pragma once

#include <thread>
#include <vector>

#include "cpu/thread_team.h"

namespace llm_ext {

template <typename Kernel>
void run_team(int threads, const Kernel& kernel) {
  Barrier barrier;
  std::vector<std::thread> others;
  for (int rank = 1; rank < threads; ++rank) {
    others.emplace_back([&, rank] { kernel(ThreadTeam{rank, threads, &barrier}); });
  }
  kernel(ThreadTeam{0, threads, &barrier});
  for (std::thread& thread : others) thread.join();
}

}  // namespace llm_ext
