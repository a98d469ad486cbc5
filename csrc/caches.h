// What the library keeps between calls, as seen from outside.
#pragma once

#include <cstdint>

namespace llm_ext {

// Bytes of the packed weights that are remembered; csrc/torch/weight_cache/packed_weight_cache.h says which.
int64_t packed_weight_cache_bytes();
void clear_packed_weight_cache();

// Bytes of memory of large tensors that waits for others; csrc/torch/alloc/cpu_caching_allocator.h says why.
int64_t cpu_cache_bytes();
void empty_cpu_cache();

}  // namespace llm_ext
