// Rows of a sequence brought to where the products over the whole sequence want them. Plain C++.
#pragma once

#include <cstdint>

namespace llm_ext {
namespace cuda {

// Row n of `to` is row n of `from`, or that of the step before or after. Rows of any type: they are only moved.
// `to` overlaps neither of the others.
struct RowCopy {
  int64_t steps;               // T, at least 1
  int64_t batch;               // B, at least 1
  const int64_t* lengths;      // [B] as in kernels.h; null: T, or packed
  const int64_t* row_offsets;  // [T + 1] as in kernels.h; null: not packed
  int shift;                   // -1: of the step before, 0: the same, 1: of the step after
  int64_t row_bytes;           // a multiple of 2
  const void* from;            // [N] rows
  int64_t from_stride;         // bytes from row to row, a multiple of 2
  const void* first;           // [B] rows, which stand where no step is before (or after); null: zeros
  void* to;                    // [N] rows, out, one after the other; 0 beyond a row's length
};

// Queues the copy; a cudaError_t.
int copy_rows(const RowCopy& copy, void* stream);

}  // namespace cuda
}  // namespace llm_ext
