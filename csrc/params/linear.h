// Arguments of a linear layer, y = x W^T + b. Letters and conventions: params/types.h.
#pragma once

#include <cstdint>

#include "params/types.h"

namespace llm_ext {

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
  const S* addend;  // [N, O] added to y; null: zeros
  bool tanh;        // whether y is the tanh of the sum
  S* y;             // [N, O] out
  S* workspace;     // forward_workspace() elements, aligned to 64 bytes, uninitialized
};

// The index of the maximum of each row of y, which is not stored.
template <typename S>
struct LinearArgmaxParams {
  LinearSizes sizes;  // 0 < O < 2^31
  const S* x;         // [N, I]
  const S* w;         // [O, I]
  const S* b;         // [O]; null: zeros
  int64_t* indices;   // [N] out: the first of equal maxima; NaN counts as larger than any number
  S* workspace;       // argmax_workspace() elements, aligned to 64 bytes, uninitialized
};

template <typename S>
struct LinearBackwardParams {
  LinearSizes sizes;
  const S* grad_y;  // [N, O]
  const S* x;       // [N, I]
  const S* w;       // [O, I]
  S* dx;            // [N, I] out; null: not needed
  S* dw;            // [O, I] out; null: not needed
  S* db;            // [O] out; null: not needed
  S* workspace;     // backward_workspace() elements, aligned to 64 bytes, uninitialized
};

}  // namespace llm_ext
