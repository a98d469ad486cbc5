// A few numbers side by side, read and written by one instruction. Plain C++.
#pragma once

namespace llm_ext {
namespace cuda {

template <typename T, int n>
struct alignas(sizeof(T) * n) Pack {
  T at[n];
};

}  // namespace cuda
}  // namespace llm_ext
