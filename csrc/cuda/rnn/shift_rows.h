// Copies the rows of a sequence, shifted by a step, and zeroes padding. Plain C++.
#pragma once

#include <cstdint>

namespace llm_ext {
namespace cuda {

// Row n of `to` is row n of `from`, or the same batch row of the step before or after. The type of the rows does not
// matter. `to` overlaps neither of the others.
struct RowShift {
  int64_t steps;               // T, at least 1
  int64_t batch;               // B, at least 1
  const int64_t* lengths;      // [B] as in launchers.h; null: T, or packed
  const int64_t* row_offsets;  // [T + 1] as in launchers.h; null: not packed
  int shift;                   // -1: the step before, 0: the same step, 1: the step after
  int64_t row_bytes;           // a multiple of 2
  const void* from;            // [N] rows
  int64_t from_stride;         // bytes between rows, a multiple of 2
  const void* first;           // [B] rows, used where there is no step before (or after); null: zeros
  void* to;                    // [N] contiguous rows, out; 0 beyond a row's length
};

// Queues the copy and returns a cudaError_t.
int shift_rows(const RowShift& call, void* stream);

}  // namespace cuda
}  // namespace llm_ext
