// The steps of a sequence: their rows, their order and their cost.
#pragma once

#include "cpu/isa/isa.h"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

static inline int64_t total_rows(const RecurrenceSizes& s) { return s.row_offsets[s.steps]; }

// Whether all sequences of the batch have the same length.
static inline bool of_one_length(const RecurrenceSizes& s) { return total_rows(s) == s.steps * s.batch; }

// Multiply-adds per row and step.
static inline double row_work(const RecurrenceSizes& s) {
  const double gates = static_cast<double>(gates_of(s.mode)) * s.hidden * s.output;
  return s.projected() ? gates + static_cast<double>(s.hidden) * s.output : gates;
}

// The steps in the order they run: position i of the order is step index(i).
struct Order {
  const RecurrenceSizes& s;

  int64_t index(int64_t i) const { return s.reverse ? s.steps - 1 - i : i; }
  int64_t first_row(int64_t i) const { return s.row_offsets[index(i)]; }
  // Rows of position i; 0 before the first and after the last.
  int64_t rows(int64_t i) const {
    if (i < 0 || i >= s.steps) return 0;
    const int64_t t = index(i);
    return s.row_offsets[t + 1] - s.row_offsets[t];
  }
};

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
