// What the library remembers between calls, as seen from outside.
#pragma once

#include <cstdint>

namespace llm_ext {

// Bytes of the packed weights that are remembered; csrc/torch/packed_weights.h says which.
int64_t remembered_bytes();
void forget_weights();

}  // namespace llm_ext
