#include "torch/alloc/cpu_caching_allocator.h"

#include <sys/mman.h>

#include <new>

#include "exports.h"

namespace llm_ext {
namespace {

// Beyond this limit the blocks that were freed first return to the system.
constexpr int64_t kMaxCachedBytes = 512 << 20;
// A cached block serves a request if it exceeds it by at most 1 / kSlack.
constexpr int64_t kSlack = 4;
// Huge pages, where Linux grants them, make fresh memory several times as fast: docs/lab/large-tensors.md.
constexpr int64_t kHugePage = 2 << 20;

// The pages come from the system itself: malloc keeps freed blocks of up to 32 MiB once it has seen one of that size.
Block allocate_from_system(int64_t bytes) {
  constexpr int kAccess = PROT_READ | PROT_WRITE, kFlags = MAP_PRIVATE | MAP_ANONYMOUS;
  void* const mapped = mmap(nullptr, bytes + kHugePage, kAccess, kFlags, -1, 0);
  if (mapped == MAP_FAILED) return {};
  // The pages before and after the aligned block are returned.
  char* const begin = static_cast<char*>(mapped);
  const int64_t before = -reinterpret_cast<intptr_t>(mapped) & (kHugePage - 1);
  char* const data = begin + before;
  if (before > 0) munmap(begin, before);
  munmap(data + bytes, kHugePage - before);
#ifdef MADV_HUGEPAGE
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return {data, bytes};
}

void return_to_system(const Block& block) { munmap(block.data, block.bytes); }

}  // namespace

Block CpuCachingAllocator::allocate(int64_t bytes) {
  const int64_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock) {
      auto best = cached_.end();
      for (auto block = cached_.begin(); block != cached_.end(); ++block) {
        const bool fits = block->bytes >= rounded && block->bytes - rounded / kSlack <= rounded;
        if (fits && (best == cached_.end() || block->bytes < best->bytes)) best = block;
      }
      if (best != cached_.end()) {
        const Block block = *best;
        bytes_ -= block.bytes;
        cached_.erase(best);
        return block;
      }
    }
  }
  Block block = allocate_from_system(rounded);
  if (block.data == nullptr) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock) free_cached();
    block = allocate_from_system(rounded);
  }
  return block;
}

void CpuCachingAllocator::free(const Block& block) {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock || block.bytes > kMaxCachedBytes) return return_to_system(block);
  try {
    cached_.push_front(block);
  } catch (const std::bad_alloc&) {  // torch calls this through a C interface, which no exception may pass
    return return_to_system(block);
  }
  bytes_ += block.bytes;
  while (bytes_ > kMaxCachedBytes) {
    bytes_ -= cached_.back().bytes;
    return_to_system(cached_.back());
    cached_.pop_back();
  }
}

void CpuCachingAllocator::free_cached() {
  for (const Block& block : cached_) return_to_system(block);
  cached_.clear();
  bytes_ = 0;
}

void CpuCachingAllocator::clear() {
  const std::scoped_lock lock(mutex_);
  free_cached();
}

int64_t CpuCachingAllocator::bytes() {
  const std::scoped_lock lock(mutex_);
  return bytes_;
}

CpuCachingAllocator& cpu_caching_allocator() {
  static CpuCachingAllocator& allocator = *new CpuCachingAllocator;  // never destroyed: tensors may outlive it
  return allocator;
}

int64_t cpu_cache_bytes() { return cpu_caching_allocator().bytes(); }
void empty_cpu_cache() { cpu_caching_allocator().clear(); }

}  // namespace llm_ext
