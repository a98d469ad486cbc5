// The dtypes of torch that belong to C++ types, and dispatch on them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "params/types.h"
#include "torch/tensor.h"

namespace llm_ext {

using torch::headeronly::ScalarType;

// The dtype of tensors whose elements are T.
template <typename T>
constexpr ScalarType scalar_type() {
  if constexpr (std::is_same_v<T, float>) {
    return ScalarType::Float;
  } else if constexpr (std::is_same_v<T, double>) {
    return ScalarType::Double;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return ScalarType::BFloat16;
  } else if constexpr (std::is_same_v<T, Float16>) {
    return ScalarType::Half;
  } else if constexpr (std::is_same_v<T, int64_t>) {
    return ScalarType::Long;
  } else if constexpr (std::is_same_v<T, uint8_t>) {
    return ScalarType::Byte;
  } else if constexpr (std::is_same_v<T, int8_t>) {
    return ScalarType::Char;
  } else {
    static_assert(std::is_same_v<T, bool>, "no op has tensors of this type");
    return ScalarType::Bool;
  }
}
template <typename T>
inline constexpr ScalarType kScalarType = scalar_type<T>();

// Calls run(T{}), T being that one of the listed types whose dtype is that of t.
template <typename First, typename... Others, typename Run>
auto with_type(const Tensor& t, const char* op, const char* name, const Run& run) {
  const ScalarType dtype = t.scalar_type();
  if constexpr (sizeof...(Others) > 0) {
    if (dtype != kScalarType<First>) return with_type<Others...>(t, op, name, run);
  }
  STD_TORCH_CHECK(dtype == kScalarType<First>, op, ": ", name, " has a dtype that is not supported");
  return run(First{});
}

}  // namespace llm_ext
