// Scratch memory of one call.
#pragma once

#include <cstdint>

#include "torch/alloc/empty.h"

namespace llm_ext {

// Aligned to 64 bytes; null if there are no elements. Frees the memory when it goes out of scope.
template <typename T>
class Workspace {
 public:
  Workspace() = default;
  explicit Workspace(int64_t elements, const Device& device = {}) {
    if (elements > 0) tensor_ = empty({elements}, kScalarType<T>, device);
  }
  T* get() const { return tensor_.has_value() ? mutable_data<T>(*tensor_) : nullptr; }

 private:
  OptionalTensor tensor_;
};

}  // namespace llm_ext
