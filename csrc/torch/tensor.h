// Names and small queries of tensors.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "torch/stable.h"

namespace llm_ext {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const OptionalTensor kNone;

inline bool has_sizes(const Tensor& t, std::initializer_list<int64_t> sizes) {
  if (t.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t i = 0;
  for (int64_t size : sizes) {
    if (t.size(i++) != size) return false;
  }
  return true;
}

// Whether any of the tensors, the results of an op, has elements. Only then a kernel runs: the sizes of a tensor
// without elements take no memory, but the loops of a kernel over them would take time.
template <typename... Tensors>
bool any_elements(const Tensors&... tensors) {
  return ((tensors.numel() > 0) || ...);
}

// Multiplies *volume by a size, or by 1 if the size is 0. False: it would overflow.
inline bool multiply(int64_t* volume, int64_t size) {
  return !__builtin_mul_overflow(*volume, size > 0 ? size : 1, volume);
}

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline bool is_aligned(const Tensor& t, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % bytes == 0;
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Dense, and aligned to the 16 bytes that CUDA kernels read at a time.
inline Tensor aligned(const Tensor& t) {
  const Tensor d = dense(t);
  return is_aligned(d, 16) ? d : torch::stable::clone(d);
}

// Never null, not even for a tensor without elements: null tells a kernel that an optional tensor is absent.
template <typename T>
T* mutable_data(const Tensor& t) {
  alignas(64) static T none[1];
  T* p = static_cast<T*>(t.data_ptr());
  return p != nullptr ? p : none;
}
template <typename T>
const T* data(const Tensor& t) {
  return mutable_data<T>(t);
}

}  // namespace llm_ext
