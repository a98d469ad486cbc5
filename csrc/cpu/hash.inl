// A content hash of memory, by which the packed weight cache recognizes weights.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

typedef uint64_t Words __attribute__((vector_size(LLM_EXT_VECTOR_BYTES)));

// The products of the lower and the upper halves of each word.
static inline Words multiply_halves(Words w) {
#if LLM_EXT_VECTOR_BYTES == 64
  return (Words)_mm512_mul_epu32((__m512i)w, (__m512i)(w >> 32));
#elif LLM_EXT_VECTOR_BYTES == 32
  return (Words)_mm256_mul_epu32((__m256i)w, (__m256i)(w >> 32));
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)w, (__m128i)(w >> 32));
#else
  return (w & 0xffffffffu) * (w >> 32);
#endif
}

// Finalizer of a 64-bit hash: every bit of x reaches every bit of the result (D. Stafford's constants, "Mix13").
static inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Hashes each chunk of kHashChunkBytes bytes, the last of which may be shorter. All ISAs give the same hashes.
//
// The scheme of XXH3 (Y. Collet): each line of 64 bytes updates eight 64-bit sums. A word, xored with a key that
// changes from line to line, adds the product of its halves to its own sum and itself to its neighbour's, so that a
// factor of zero cannot hide a change.
static void hash(const void* data, int64_t bytes, Hash128* chunks, const ThreadTeam& team) {
  constexpr int kLine = 64;
  constexpr int kVectors = kLine / LLM_EXT_VECTOR_BYTES;
  constexpr int kWords = LLM_EXT_VECTOR_BYTES / 8;
  constexpr uint64_t kStep = 0x9e3779b97f4a7c15u;  // 2^64 over the golden ratio
  const Range range = team.slice(divide_up(bytes, kHashChunkBytes));
  for (int64_t chunk = range.begin; chunk < range.end; ++chunk) {
    const char* begin = static_cast<const char*>(data) + chunk * kHashChunkBytes;
    const int64_t left = bytes - chunk * kHashChunkBytes;
    const int64_t size = left < kHashChunkBytes ? left : kHashChunkBytes;
    Words sums[kVectors], keys[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      for (int i = 0; i < kWords; ++i) {
        keys[v][i] = mix(v * kWords + i + 1);
        sums[v][i] = mix(v * kWords + i + 101);
      }
    }
    const auto add = [&](const char* line) {
      for (int v = 0; v < kVectors; ++v) {
        Words words;
        __builtin_memcpy(&words, line + v * LLM_EXT_VECTOR_BYTES, sizeof(words));
        Words neighbours;
        for (int i = 0; i < kWords; ++i) neighbours[i] = words[i ^ 1];
        sums[v] += multiply_halves(words ^ keys[v]) + neighbours;
        keys[v] += kStep;
      }
    };
    int64_t i = 0;
    for (; i + kLine <= size; i += kLine) add(begin + i);
    if (i < size) {
      char line[kLine] = {};
      __builtin_memcpy(line, begin + i, size - i);
      add(line);
    }
    uint64_t a = size, b = ~static_cast<uint64_t>(size);
    for (int v = 0; v < kVectors; ++v) {
      for (int w = 0; w < kWords; ++w) {
        a = mix(a ^ sums[v][w]);
        b = mix(b + sums[v][w] * kStep);
      }
    }
    chunks[chunk] = {a, b};
  }
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
