// Adjacent numbers that a thread has loaded, in registers.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"

namespace llm_ext {
namespace cuda {

// n numbers of S. 16-bit numbers stay words until they are used. A load that unpacked them in its branch would wait for
// them there, and no other load would begin before they have arrived; and to widen one of two in a word takes one
// instruction, where one that is held by itself takes two.
template <typename S, int n>
struct WordPack {
  using Word = std::conditional_t<sizeof(S) == 2, uint32_t, S>;
  static constexpr int kEach = sizeof(S) == 2 && n % 2 == 0 ? 2 : 1, kSize = n;
  Pack<Word, n / kEach> words = {};

  LLM_EXT_DEVICE S get(int i) const {
    if constexpr (sizeof(S) == 2) {
      return S{static_cast<uint16_t>(words.at[i / kEach] >> 16 * (i % kEach))};
    } else {
      return words.at[i];
    }
  }
  // Once, from 0 on.
  LLM_EXT_DEVICE void set(int i, S x) {
    if constexpr (sizeof(S) == 2) {
      words.at[i / kEach] |= static_cast<uint32_t>(x.bits) << 16 * (i % kEach);
    } else {
      words.at[i] = x;
    }
  }
  LLM_EXT_DEVICE Compute<S> operator[](int i) const { return widen(get(i)); }

  // Addresses are aligned to the size of the pack.
  LLM_EXT_DEVICE void load(const S* from) {
    if constexpr (sizeof(S) == 2 && kEach == 1) {
#pragma unroll
      for (int i = 0; i < n; ++i) words.at[i] = from[i].bits;
    } else {
      words = *reinterpret_cast<const Pack<Word, n / kEach>*>(from);
    }
  }
  LLM_EXT_DEVICE void store(S* to) const {
    if constexpr (sizeof(S) == 2 && kEach == 1) {
#pragma unroll
      for (int i = 0; i < n; ++i) to[i] = get(i);
    } else {
      *reinterpret_cast<Pack<Word, n / kEach>*>(to) = words;
    }
  }
};

// 16 bytes of a row, for a lane.
template <typename S>
using LanePack = WordPack<S, 16 / sizeof(S)>;

}  // namespace cuda
}  // namespace llm_ext
