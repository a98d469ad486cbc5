#include "torch/large_blocks.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>

#include "memory.h"

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

Block LargeBlocks::take(int64_t bytes) {
  const int64_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock) {
      auto best = kept_.end();
      for (auto block = kept_.begin(); block != kept_.end(); ++block) {
        const bool fits = block->bytes >= whole && block->bytes - whole / kSlack <= whole;
        if (fits && (best == kept_.end() || block->bytes < best->bytes)) best = block;
      }
      if (best != kept_.end()) {
        const Block block = *best;
        bytes_ -= block.bytes;
        kept_.erase(best);
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

void LargeBlocks::give_back(const Block& block) {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock || block.bytes > kMostBytes) return std::free(block.data);
  kept_.push_front(block);
  bytes_ += block.bytes;
  while (bytes_ > kMostBytes) {
    bytes_ -= kept_.back().bytes;
    std::free(kept_.back().data);
    kept_.pop_back();
  }
}

void LargeBlocks::free_all() {
  for (const Block& block : kept_) std::free(block.data);
  kept_.clear();
  bytes_ = 0;
}

void LargeBlocks::clear() {
  const std::scoped_lock lock(mutex_);
  free_all();
}

int64_t LargeBlocks::bytes() {
  const std::scoped_lock lock(mutex_);
  return bytes_;
}

LargeBlocks& large_blocks() {
  static LargeBlocks& blocks = *new LargeBlocks;  // never destroyed: tensors may live longer
  return blocks;
}

int64_t cached_bytes() { return large_blocks().bytes(); }
void empty_cache() { large_blocks().clear(); }

}  // namespace llm_ext
