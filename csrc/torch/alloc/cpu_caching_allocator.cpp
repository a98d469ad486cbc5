#include "torch/alloc/cpu_caching_allocator.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>

#include "caches.h"

namespace llm_ext {
namespace {

// Beyond these the blocks that have waited longest go back to the system.
constexpr int64_t kMostBytes = 512 << 20;
// A block may be larger than what is asked for by one part in so many.
constexpr int64_t kSlack = 4;

// Blocks are whole huge pages, where Linux grants them: 84 MB take 57 ms to come in pages of 4 KB, and 12 in pages of
// 2 MB (a virtual machine with Linux 6.18).
constexpr int64_t kHugePage = 2 << 20;

Block from_system(int64_t whole) {
  Block block = {std::aligned_alloc(kHugePage, whole), whole};
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (block.data != nullptr) madvise(block.data, whole, MADV_HUGEPAGE);
#endif
  return block;
}

}  // namespace

Block CpuCachingAllocator::take(int64_t bytes) {
  const int64_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock) {
      auto best = saved_.end();
      for (auto block = saved_.begin(); block != saved_.end(); ++block) {
        const bool fits = block->bytes >= whole && block->bytes - whole / kSlack <= whole;
        if (fits && (best == saved_.end() || block->bytes < best->bytes)) best = block;
      }
      if (best != saved_.end()) {
        const Block block = *best;
        bytes_ -= block.bytes;
        saved_.erase(best);
        return block;
      }
    }
  }
  Block block = from_system(whole);
  if (block.data == nullptr) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock) free_all();
    block = from_system(whole);
  }
  return block;
}

void CpuCachingAllocator::give_back(const Block& block) {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock || block.bytes > kMostBytes) return std::free(block.data);
  saved_.push_front(block);
  bytes_ += block.bytes;
  while (bytes_ > kMostBytes) {
    bytes_ -= saved_.back().bytes;
    std::free(saved_.back().data);
    saved_.pop_back();
  }
}

void CpuCachingAllocator::free_all() {
  for (const Block& block : saved_) std::free(block.data);
  saved_.clear();
  bytes_ = 0;
}

void CpuCachingAllocator::clear() {
  const std::scoped_lock lock(mutex_);
  free_all();
}

int64_t CpuCachingAllocator::bytes() {
  const std::scoped_lock lock(mutex_);
  return bytes_;
}

CpuCachingAllocator& cpu_caching_allocator() {
  static CpuCachingAllocator& blocks = *new CpuCachingAllocator;  // never destroyed: tensors may live longer
  return blocks;
}

int64_t cpu_cache_bytes() { return cpu_caching_allocator().bytes(); }
void empty_cpu_cache() { cpu_caching_allocator().clear(); }

}  // namespace llm_ext
