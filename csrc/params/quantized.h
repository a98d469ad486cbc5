// Arguments of recurrences and linear layers with weights of 8 or 16 bits and float inputs and results. The numbers are
// defined in llm_ext/reference/quantization.py.
#pragma once

#include <cstdint>

#include "params/linear.h"
#include "params/rnn.h"
#include "params/types.h"

namespace llm_ext {

// Rows of a weight matrix in a panel, and numbers of a row that are adjacent there. They do not depend on the ISA,
// because packed weights are stored in files.
constexpr int64_t kQuantizedPanel = 16;
constexpr int64_t kInputDepth = 2;
constexpr int64_t kByteDepth = 4;  // of int8 weights that meet states
template <typename W>
constexpr int64_t kStateDepth = sizeof(W) == 1 ? kByteDepth : 2;

// A state meets int8 weights as bytes, to which this is added: they are from 1 to 127.
constexpr int kByteOffset = 64;

// Columns of an int8 matrix, so that the sum of a row times bytes of 127 fits into int32.
constexpr int64_t kMaxInt8Columns = (int64_t(1) << 31) / (127 * 127);

// A matrix of G blocks (gates) of R rows, [G R, K], as W, which is int8_t or BFloat16. `packed` is
// [R / panel][G][K / depth][panel][depth], R and K rounded up and padded with zeros. At kByteDepth one more
// [panel][depth] precedes those of K: an int32 for each row, -kByteOffset times the sum of the row.
template <typename W>
struct QuantizedMatrix {
  const W* packed;
  const float* scale;  // [G R] scale of each row of int8_t; null for BFloat16
};

template <typename W>
struct QuantizedRecurrenceParams {
  RecurrenceForwardParams<float> call;  // its weights, saved, packed and input_projections are null
  QuantizedMatrix<W> ih;                // depth kInputDepth
  QuantizedMatrix<W> hh;                // depth kStateDepth
  QuantizedMatrix<W> hr;                // depth kStateDepth; LSTM: the projection; null exactly if P = H
};

template <typename W>
struct QuantizedLinearParams {
  LinearSizes sizes;
  const float* x;        // [N, I]
  QuantizedMatrix<W> w;  // one block of depth kInputDepth
  const float* b;        // [O]; null: zeros
  float* y;              // [N, O] out
  float* workspace;      // linear_workspace() elements, aligned to 64 bytes, uninitialized
};

}  // namespace llm_ext
