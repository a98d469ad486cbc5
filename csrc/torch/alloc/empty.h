// Allocation of tensors. Large ones on the CPU come from the CPU caching allocator.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "torch/device.h"
#include "torch/dtypes.h"
#include "torch/tensor.h"

namespace llm_ext {

// The layout must be dense: the allocation is as large as the product of the sizes.
Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType dtype,
                     const Device& device = {});
// Contiguous.
Tensor empty(const int64_t* sizes, int64_t dim, ScalarType dtype, const Device& device = {});

inline Tensor empty_strided(std::initializer_list<int64_t> sizes, const int64_t* strides, ScalarType dtype,
                            const Device& device = {}) {
  return empty_strided(sizes.begin(), strides, static_cast<int64_t>(sizes.size()), dtype, device);
}
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Device& device = {}) {
  return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype, device);
}

}  // namespace llm_ext
