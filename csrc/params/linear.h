// Arguments of one call of a linear layer. The letters and conventions are those of params/types.h.
#pragma once

#include <cstdint>

#include "params/types.h"

namespace llm_ext {

// An affine map of rows, y = x W^T + b.
struct LinearSizes {
  int64_t rows;    // N
  int64_t input;   // I
  int64_t output;  // O
};

template <typename S>
struct LinearForwardParams {
  LinearSizes sizes;
  const S* x;       // [N, I]
  const S* w;       // [O, I]
  const S* b;       // [O]; null: zeros
  const S* addend;  // [N, O]; null: zeros
  bool tanh;        // whether y is the tanh of the sum
  S* y;             // [N, O] out
  S* workspace;     // forward_workspace() elements, aligned to 64 bytes; contents do not matter
};

// The place of the largest result of each row; the results themselves are not stored.
template <typename S>
struct LinearArgmaxParams {
  LinearSizes sizes;  // 0 < O < 2^31
  const S* x;         // [N, I]
  const S* w;         // [O, I]
  const S* b;         // [O]; null: zeros
  int64_t* indices;    // [N] out: of several that are equal the first; any NaN before all numbers
  S* workspace;       // argmax_workspace() elements, aligned to 64 bytes; contents do not matter
};

template <typename S>
struct LinearBackwardParams {
  LinearSizes sizes;
  const S* grad_y;  // [N, O]
  const S* x;       // [N, I]
  const S* w;       // [O, I]
  S* dx;            // [N, I] out; null: not wanted
  S* dw;            // [O, I] out; null: not wanted
  S* db;            // [O] out; null: not wanted
  S* workspace;     // backward_workspace() elements, aligned to 64 bytes; contents do not matter
};

}  // namespace llm_ext
