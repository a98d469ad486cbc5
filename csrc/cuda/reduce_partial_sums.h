// Sums of what many blocks have left in the workspace. Plain C++.
#pragma once

#include <cstdint>

#include "params/attention.h"
#include "params/linear.h"
#include "params/pooling.h"
#include "params/rnn.h"

namespace llm_ext {
namespace cuda {

// out [rows, D] from x [rows, count, D], in a fixed order.
template <typename S>
struct Parts {
  int64_t rows, count, dim;
  const Compute<S>* x;
  const Compute<S>* l;  // [rows, count] weights are softmax(l); null: weights are 1
  S* out;               // [rows, D] 0 where nothing has a weight
  Compute<S>* lse;      // [rows] out: log-sum-exp of l; null where l is
};

// Queues the sum; a cudaError_t. For S = float, double, BFloat16, Float16.
template <typename S>
int add_parts(const Parts<S>& parts, void* stream);

}  // namespace cuda
}  // namespace llm_ext
