// CPU memory of large tensors, reused from one to the next. malloc returns large blocks to the system, whose fresh
// pages cost more than many kernels take: docs/lab/large-tensors.md.
#pragma once

#include <cstdint>
#include <list>
#include <mutex>

namespace llm_ext {

struct Block {
  void* data = nullptr;
  int64_t bytes = 0;  // at least those requested
};

class CpuCachingAllocator {
 public:
  // Tensors of at least this size use this allocator.
  static constexpr int64_t kMinBytes = 4 << 20;

  // Returns a block of at least `bytes` bytes, aligned to a huge page; its data is null if memory is exhausted.
  Block allocate(int64_t bytes);
  void free(const Block& block);
  // Returns the cached blocks to the system.
  void clear();
  // Bytes of the cached blocks.
  int64_t bytes();

 private:
  void free_cached();  // the caller holds the lock

  // allocate() and free() never wait for the lock: without it they bypass the cache. A process that is forked while
  // another thread holds the lock can therefore go on.
  std::mutex mutex_;
  std::list<Block> cached_;  // most recently freed first
  int64_t bytes_ = 0;
};

// The allocator of the process.
CpuCachingAllocator& cpu_caching_allocator();

}  // namespace llm_ext
