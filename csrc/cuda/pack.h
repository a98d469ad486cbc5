// Adjacent numbers that one instruction reads or writes. Plain C++.
#pragma once

namespace llm_ext {
namespace cuda {

template <typename T, int n>
struct alignas(sizeof(T) * n) Pack {
  T at[n];
};

}  // namespace cuda
}  // namespace llm_ext
