// Sums over partial sums that many blocks left in the workspace. Plain C++.
#pragma once

#include <cstdint>

#include "params/types.h"

namespace llm_ext {
namespace cuda {

// out [rows, D] from x [rows, count, D], in a fixed order.
template <typename S>
struct PartialSums {
  int64_t rows, count, dim;
  const Compute<S>* x;
  const LogSum<Compute<S>>* l;  // [rows, count] weights are in proportion to exp(l); null: weights are 1
  S* out;                       // [rows, D] 0 where every weight is 0
  LogSum<Compute<S>>* l_out;    // [rows] out: log-sum-exp over all; null exactly where l is
  Compute<S>* lse;              // [rows] out: the same; null exactly where l is
};

// Queues the sum and returns a cudaError_t. For S = float, double, BFloat16, Float16.
template <typename S>
int reduce_partial_sums(const PartialSums<S>& sums, void* stream);

}  // namespace cuda
}  // namespace llm_ext
