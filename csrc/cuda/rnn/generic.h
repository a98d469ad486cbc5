// The generic kernels' interface to launchers and plan. Plain C++.
#pragma once

#include <cstdint>

#include "cuda/rnn/launchers.h"

namespace llm_ext {
namespace cuda {

constexpr int kGenericRows = 4;  // batch rows per block; not tuned

// Workspace per block, in elements of Compute<S>. Each block's states are contiguous.
constexpr int64_t generic_forward_scratch(int64_t hidden, int64_t output) {
  return kGenericRows * (2 * output + 2 * hidden);
}
constexpr int64_t generic_backward_scratch(int gates, int64_t hidden, int64_t output) {
  return kGenericRows * (2 * gates * hidden + output + hidden);
}

template <typename S>
int generic_recurrence(const RecurrenceForward<S>& call, void* stream);
template <typename S>
int generic_recurrence(const RecurrenceBackward<S>& call, void* stream);

}  // namespace cuda
}  // namespace llm_ext
