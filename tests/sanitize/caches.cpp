// What threads of different calls share, used by several at once: the caching allocator, the packed weight cache, and
// within a call the barrier and the counter of a thread team. And the quota of a control group.
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/thread_team.h"
#include "torch/alloc/cpu_caching_allocator.h"
#include "torch/threads/run_team.h"
#include "torch/threads/usable_cores.h"
#include "torch/weight_cache/packed_weight_cache.h"

namespace llm_ext {

// Of the kernel table the cache uses the hash alone.
const Kernels& kernels() {
  static const Kernels table = [] {
    Kernels kernels = {};
    kernels.hash = [](const void* data, int64_t bytes, Hash128* chunks, const ThreadTeam& team) {
      const int64_t count = (bytes + kHashChunkBytes - 1) / kHashChunkBytes;
      const Range own = team.slice(count);
      for (int64_t i = own.begin; i < own.end; ++i) {
        const int64_t from = i * kHashChunkBytes, left = bytes - from;
        uint64_t mixed = 14695981039346656037u;  // FNV-1a, eight bytes at a time
        for (int64_t at = 0; at < left && at < kHashChunkBytes; at += 8) {
          uint64_t word = 0;
          std::memcpy(&word, static_cast<const char*>(data) + from + at, left - at < 8 ? left - at : 8);
          mixed = (mixed ^ word) * 1099511628211u;
        }
        chunks[i] = {mixed, static_cast<uint64_t>(left)};
      }
    };
    return kernels;
  }();
  return table;
}

namespace {

constexpr int kThreads = 4;

template <typename Run>
void on_threads(const Run& run) {
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kThreads; ++rank) threads.emplace_back([&, rank] { run(rank); });
  for (std::thread& thread : threads) thread.join();
}

void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

void use_allocator(int rounds) {
  on_threads([&](int rank) {
    std::mt19937 random(rank);
    std::vector<Block> held;
    for (int i = 0; i < rounds; ++i) {
      const Block block = cpu_caching_allocator().allocate((4 + static_cast<int64_t>(random() % 9)) << 20);
      if (block.data == nullptr) fail("no memory");
      // Nobody else has this block.
      std::memset(block.data, rank, 4096);
      held.push_back(block);
      if (held.size() > 3) {
        if (*static_cast<char*>(held.front().data) != rank) fail("two threads have one block");
        cpu_caching_allocator().free(held.front());
        held.erase(held.begin());
      }
      if (i % 50 == 0) cpu_caching_allocator().clear();
      if (cpu_caching_allocator().bytes() < 0) fail("a negative number of bytes");
    }
    for (const Block& block : held) cpu_caching_allocator().free(block);
  });
  cpu_caching_allocator().clear();
}

void use_weight_cache(int rounds) {
  on_threads([&](int rank) {
    std::mt19937 random(rank);
    std::vector<char> weights(2 * kHashChunkBytes + 17);
    for (int i = 0; i < rounds; ++i) {
      weights[0] = static_cast<char>(random() % 100);
      const Hash128 hash = hash_of({{weights.data(), static_cast<int64_t>(weights.size())}}, {i % 3}, 1 + i % 2);
      if (const OptionalTensor found = packed_weight_cache().find(hash)) {
        if ((*found)->front() != weights[0]) fail("other weights");
      } else if (packed_weight_cache().record_miss(hash, 1 << 20)) {
        packed_weight_cache().insert(hash, std::make_shared<std::vector<char>>(16, weights[0]), 1 << 20);
      }
      if (i % 200 == 0) packed_weight_cache().clear();
      if (packed_weight_cache().bytes() < 0) fail("a negative number of bytes");
    }
  });
}

void use_team(int rounds) {
  for (int size = 2; size <= kThreads; ++size) {
    std::vector<int64_t> written(size);  // one thread writes, and after the barrier all read
    run_team(size, [&](const ThreadTeam& team) {
      for (int i = 0; i < rounds; ++i) {
        written[team.rank] = i;
        team.sync();
        for (const int64_t other : written) {
          if (other != i) fail("a thread has passed a barrier too early");
        }
        team.sync();
      }
    });
    Progress progress;
    int64_t value = 0;
    run_team(size, [&](const ThreadTeam& team) {
      for (int i = 1; i <= rounds; ++i) {
        if (team.rank == 0 && i == rounds) {
          value = i;
          progress.reach(i);
        }
      }
      progress.await(rounds);
      if (value != rounds) fail("a counter was ahead of what it counts");
    });
  }
}

}  // namespace
}  // namespace llm_ext

// With arguments: prints the quota that a file system of control groups and a process's list of its own give.
int main(int count, char** arguments) {
  if (count == 3) {
    std::printf("%d\n", llm_ext::smallest_quota(arguments[1], arguments[2]));
    return 0;
  }
  const int rounds = count == 2 ? std::stoi(arguments[1]) : 300;
  llm_ext::use_allocator(rounds);
  llm_ext::use_weight_cache(rounds);
  llm_ext::use_team(rounds);
  std::puts("caches: allocator, weight cache, barrier and counter");
}
