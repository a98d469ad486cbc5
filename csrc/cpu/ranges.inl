// Integer helpers: rounding, intersection of ranges, and the number of threads that an amount of work is worth.
#pragma once

#include "cpu/isa/isa.h"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Arrays in a workspace start on a cache line, whatever their element type: 64 elements.
constexpr int64_t kAlign = 64;

static inline int64_t aligned(int64_t elements) { return divide_up(elements, kAlign) * kAlign; }

// The number of threads, at most `threads`, that `work` is worth, at `work_per_thread` for each.
static inline int threads_worth(double work, double work_per_thread, int threads) {
  const double useful = work / work_per_thread;
  return useful >= threads ? threads : (useful < 1 ? 1 : static_cast<int>(useful));
}

static inline Range intersect(Range a, Range b) {
  const int64_t begin = a.begin > b.begin ? a.begin : b.begin;
  const int64_t end = a.end < b.end ? a.end : b.end;
  return {begin, end > begin ? end : begin};
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
