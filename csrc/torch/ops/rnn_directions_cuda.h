// The directions of a layer, from the arguments of the ops that run several.
#pragma once

#include <string>
#include <vector>

#include "torch/ops/cuda_matrix.h"
#include "torch/ops/rnn.h"
#include "torch/ops/rnn_layer_cuda.h"
#include "torch/tensor.h"

namespace llm_ext {

// Weights are given one direction after the other, states [directions, B, *].
class Directions {
 public:
  Directions(const char* op, const std::string& mode, const Tensor& x, const OptionalTensor& h0,
             const OptionalTensor& c0, const std::vector<Tensor>& weights, bool bias, int count)
      : op_(op), mode_(mode_named(op, mode)), x_(x), count_(count), bias_(bias) {
    each_ = static_cast<int>(weights.size()) / count;
    projected_ = each_ == (bias ? 5 : 3);
    STD_TORCH_CHECK(static_cast<int>(weights.size()) == each_ * count && each_ - projected_ == (bias ? 4 : 2) &&
                        (!projected_ || mode_ == Mode::kLstm),
                    op, ": weights must be w_ih, w_hh, the biases and w_hr of each direction, got ", weights.size());
    check_states(op, mode_ == Mode::kLstm ? h0 : kNone, c0);
    for (const Tensor& w : weights) weights_.emplace_back(w);
    for (int d = 0; d < count; ++d) {
      h0_.push_back(state_of_direction("h0", h0, d));
      c0_.push_back(state_of_direction("c0", c0, d));
    }
  }

  // The state [B, *] of a direction.
  OptionalTensor state_of_direction(const char* name, const OptionalTensor& state, int d) const {
    if (!state.has_value()) return std::nullopt;
    STD_TORCH_CHECK(state->dim() == 3 && state->size(0) == count_, op_, ": ", name, " must be [", count_,
                    ", B, *], got ", shape_text(*state));
    return matrix(*state, state->size(1), state->size(2), {state->stride(1), state->stride(2)}, d * state->stride(0));
  }

  RnnArguments arguments(int d, const OptionalTensor& batch_sizes, const OptionalTensor& lengths, bool tf32) const {
    const OptionalTensor* own = &weights_[d * each_];
    RnnArguments a;
    a.op = op_;
    a.mode = mode_;
    a.x = &x_;
    a.h0 = &h0_[d];
    a.c0 = &c0_[d];
    a.w_ih = &*own[0];
    a.w_hh = &*own[1];
    a.w_hr = projected_ ? &own[each_ - 1] : &kNone;
    a.batch_sizes = &batch_sizes;
    a.lengths = &lengths;
    a.reverse = d == 1;
    a.tf32 = tf32;
    return a;
  }
  DirectionForward forward(int d, const OptionalTensor& batch_sizes, const OptionalTensor& lengths, bool tf32) const {
    const OptionalTensor* own = &weights_[d * each_];
    return {arguments(d, batch_sizes, lengths, tf32), bias_ ? own[2] : kNone, bias_ ? own[3] : kNone};
  }
  // Appends the gradients of a direction's weights.
  void append_gradients(const RnnBackwardResults& r, std::vector<Tensor>& to) const {
    to.insert(to.end(), {r.dw_ih, r.dw_hh});
    if (bias_) to.insert(to.end(), {r.db_ih, r.db_hh});
    if (projected_) to.push_back(r.dw_hr);
  }

 private:
  const char* op_;
  const Mode mode_;
  const Tensor& x_;
  const int count_;
  const bool bias_;
  int each_;  // tensors per direction
  bool projected_;
  std::vector<OptionalTensor> weights_, h0_, c0_;
};

}  // namespace llm_ext
