// What the library keeps between calls, as seen from outside.
#pragma once

#include <cstdint>

namespace llm_ext {

// Bytes of the packed weights that are remembered; csrc/torch/packed_weights.h says which.
int64_t remembered_bytes();
void forget_weights();

// Bytes of memory of large tensors that waits for others; csrc/torch/large_blocks.h says why.
int64_t cached_bytes();
void empty_cache();

}  // namespace llm_ext
