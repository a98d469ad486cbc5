// Memory of large tensors on the CPU, saved from one to the next.
//
// glibc takes blocks of 32 MB and more from the system whenever they are asked for, and gives them back at once. Such
// memory comes page by page, zeroed, at its first use: on 2 cores of a Zen 5 134 MB in 8 ms, which is longer than
// pooling takes to write them. Smaller ones it keeps, but aligned ones can leave holes that it does not fill again: the
// scores of a validation, 8 MB at a time, took 6 GB. So what a large result or workspace has left waits for the next
// one of about its size.
#pragma once

#include <cstdint>
#include <list>
#include <mutex>

namespace llm_ext {

struct Block {
  void* data = nullptr;
  int64_t bytes = 0;  // may be some more than were asked for
};

class CpuCachingAllocator {
 public:
  // From so many bytes on, tensors have their memory from here.
  static constexpr int64_t kLeastBytes = 4 << 20;

  // Of at least so many bytes, aligned to a huge page; its data is null where there is no memory.
  Block take(int64_t bytes);
  void give_back(const Block& block);
  void clear();
  int64_t bytes();

 private:
  void free_all();  // by whoever holds the lock

  // Nobody waits for it but clear() and bytes(): whoever does not get it goes to the system. So a process forked while
  // it was held goes on.
  std::mutex mutex_;
  std::list<Block> saved_;  // the one given back last comes first
  int64_t bytes_ = 0;
};

// Those of the process.
CpuCachingAllocator& cpu_caching_allocator();

}  // namespace llm_ext
