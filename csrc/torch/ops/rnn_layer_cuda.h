// One layer on an NVIDIA GPU: one or two directions in one launch.
#pragma once

#include <vector>

#include "torch/ops/rnn.h"
#include "torch/tensor.h"

namespace llm_ext {

// The arguments of one direction; the second of two runs in reverse.
struct DirectionForward {
  RnnArguments common;
  OptionalTensor b_ih, b_hh;
};
struct DirectionBackward {
  RnnBackwardArguments common;  // without the gradients of the states
  OptionalTensor grad_h_n, grad_c_n;
};

// Both directions share the rows of y [N, 2 P] and of its gradient; their states and saved activations are adjacent,
// [2, ...].
RnnForwardResults forward_layer(const std::vector<DirectionForward>& directions, bool needs_autograd);

// Returns the gradients per direction; dx, dh0 and dc0 are those of all directions, repeated in each element.
std::vector<RnnBackwardResults> backward_layer(const std::vector<DirectionBackward>& directions,
                                               const OptionalTensor& grad_y, const Tensor& y,
                                               const OptionalTensor& saved);

}  // namespace llm_ext
