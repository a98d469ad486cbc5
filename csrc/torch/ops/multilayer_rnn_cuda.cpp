// multilayer_rnn_forward on NVIDIA GPUs.
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "torch/alloc/empty.h"
#include "torch/device.h"
#include "torch/ops/cuda_matrix.h"
#include "torch/ops/rnn_directions_cuda.h"
#include "torch/ops/rnn_layer_cuda.h"
#include "torch/stable.h"
#include "torch/tensor.h"

namespace llm_ext {
namespace {

// Layer by layer: on a GPU each has all of the device.
std::tuple<Tensor, Tensor, Tensor> multilayer_rnn_forward(const std::string& mode, const Tensor& x,
                                                          const OptionalTensor& h0, const OptionalTensor& c0,
                                                          const std::vector<Tensor>& weights, bool bias,
                                                          bool bidirectional,
                                                          const std::vector<Tensor>& input_projections,
                                                          const OptionalTensor& batch_sizes, bool tf32) {
  constexpr const char* kOp = "multilayer_rnn_forward";
  STD_TORCH_CHECK(input_projections.empty() && !batch_sizes.has_value(), kOp,
                  ": input_projections and batch_sizes are for cpu only");
  const int directions = bidirectional ? 2 : 1, each = bias ? 4 : 2;
  const int rows = static_cast<int>(weights.size()) / each, layers = rows / directions;
  STD_TORCH_CHECK(x.dim() == 3, kOp, ": x must be [T, B, I], got ", shape_text(x));
  STD_TORCH_CHECK(layers > 0 && static_cast<int>(weights.size()) == layers * directions * each, kOp,
                  ": weights must be ", each, " tensors for each of the ", directions,
                  " directions of each layer, got ", weights.size());
  for (const OptionalTensor& state : {h0, c0}) {
    STD_TORCH_CHECK(!state.has_value() || (state->dim() == 3 && state->size(0) == rows), kOp, ": states must be [",
                    rows, ", B, H]");
  }
  const int64_t B = x.size(1), H = weights[1].dim() == 2 ? weights[1].size(1) : 0;
  for (size_t i = 1; i < weights.size(); i += each) {
    STD_TORCH_CHECK(weights[i].dim() == 2 && weights[i].size(1) == H, kOp,
                    ": w_hh must be [G H, H], with one H for all layers and directions, got ", shape_text(weights[i]));
  }
  const bool lstm = mode == "LSTM";
  const Tensor h_n = empty({rows, B, H}, x.scalar_type(), device_of(x));
  const Tensor c_n = empty({lstm ? rows : 0, B, H}, x.scalar_type(), device_of(x));
  Tensor y = x;
  for (int layer = 0; layer < layers; ++layer) {
    const int row = layer * directions;
    const auto of_layer = [&](OptionalTensor state) {
      return state ? OptionalTensor(torch::stable::narrow(*state, 0, row, directions)) : std::nullopt;
    };
    const OptionalTensor h = of_layer(h0), c = of_layer(c0);
    const std::vector<Tensor> own(weights.begin() + row * each, weights.begin() + (row + directions) * each);
    const Directions all(kOp, mode, y, h, c, own, bias, directions);
    std::vector<DirectionForward> given;
    for (int d = 0; d < directions; ++d) given.push_back(all.forward(d, kNone, kNone, tf32));
    const RnnForwardResults r = forward_layer(given, false);
    const auto store = [&](const Tensor& from, const Tensor& to) {
      copy(matrix(to, directions * B, H, {H, 1}, row * B * H), matrix(from, directions * B, H));
    };
    store(r.h_n, h_n);
    if (lstm) store(*r.c_n, c_n);
    y = r.y;
  }
  return {y, h_n, c_n};
}

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CUDA, m) {
  m.impl("multilayer_rnn_forward", TORCH_BOX(&llm_ext::multilayer_rnn_forward));
}
