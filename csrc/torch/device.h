// The device of a tensor: the CPU or one of the CUDA devices.
#pragma once

#include <cstdint>
#include <string>

#include "torch/tensor.h"

namespace llm_ext {

struct Device {
  int32_t type = aoti_torch_device_type_cpu();  // as torch's C shim numbers the types
  int32_t index = 0;

  bool is_cpu() const { return type == aoti_torch_device_type_cpu(); }
  bool holds(const Tensor& t) const { return is_cpu() ? t.is_cpu() : t.is_cuda() && t.get_device_index() == index; }
  std::string text() const { return is_cpu() ? "cpu" : "cuda:" + std::to_string(index); }
};

inline Device device_of(const Tensor& t) {
  if (t.is_cpu()) return {};
  STD_TORCH_CHECK(t.is_cuda(), "llm_ext: tensors must be on cpu or cuda");
  return {aoti_torch_device_type_cuda(), t.get_device_index()};
}

}  // namespace llm_ext
