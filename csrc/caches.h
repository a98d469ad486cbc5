// The caches that outlive a call, as module.cpp exposes them.
#pragma once

#include <cstdint>

namespace llm_ext {

// The cache of csrc/torch/weight_cache/packed_weight_cache.h.
int64_t packed_weight_cache_bytes();
void clear_packed_weight_cache();

// The cache of csrc/torch/alloc/cpu_caching_allocator.h.
int64_t cpu_cache_bytes();
void empty_cpu_cache();

}  // namespace llm_ext
