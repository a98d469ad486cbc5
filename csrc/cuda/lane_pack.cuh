// The 16 bytes of a row of S that a thread has in registers.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"

namespace llm_ext {
namespace cuda {

// Two numbers of 16 bits stay one word until they are used. To widen a number takes one instruction then, where one
// that is held by itself takes two; and a load does not wait for its numbers to unpack them.
template <typename S>
struct LanePack {
  using Word = std::conditional_t<sizeof(S) == 2, uint32_t, S>;
  static constexpr int kSize = 16 / sizeof(S), kEach = sizeof(Word) / sizeof(S);
  using Words = Pack<Word, kSize / kEach>;
  Words words = {};

  LLM_EXT_DEVICE S get(int n) const {
    if constexpr (kEach == 2) {
      return S{static_cast<uint16_t>(words.at[n / 2] >> 16 * (n % 2))};
    } else {
      return words.at[n];
    }
  }
  // Once, from 0 on.
  LLM_EXT_DEVICE void set(int n, S x) {
    if constexpr (kEach == 2) {
      words.at[n / 2] |= static_cast<uint32_t>(x.bits) << 16 * (n % 2);
    } else {
      words.at[n] = x;
    }
  }
  LLM_EXT_DEVICE Compute<S> operator[](int n) const { return widen(get(n)); }

  // Addresses are aligned to 16 bytes.
  LLM_EXT_DEVICE void load(const S* from) { words = *reinterpret_cast<const Words*>(from); }
  LLM_EXT_DEVICE void store(S* to) const { *reinterpret_cast<Words*>(to) = words; }
};

}  // namespace cuda
}  // namespace llm_ext
