// The generic kernels as launchers and the plan see them. Plain C++.
#pragma once

#include <cstdint>

#include "cuda/rnn/launchers.h"

namespace llm_ext {
namespace cuda {

constexpr int kGenericRows = 4;  // rows of the batch a block; not measured yet

// Numbers of workspace a block, of the type that is computed in. States of a block lie in one piece.
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
