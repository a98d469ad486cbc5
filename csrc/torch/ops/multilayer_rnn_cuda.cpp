// multilayer_rnn_forward on NVIDIA GPUs.
#include <cstdint>
#include <initializer_list>
#include <string>
#include <tuple>
#include <vector>

#include "torch/alloc/empty.h"
#include "torch/device.h"
#include "torch/ops/cuda_matrix.h"
#include "torch/ops/rnn.h"
#include "torch/ops/rnn_directions_cuda.h"
#include "torch/ops/rnn_layer_cuda.h"
#include "torch/stable.h"
#include "torch/tensor.h"
#include "torch/tensor_args.h"

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
  // The checks of all layers come before the first one runs.
  const Device device = device_of(x);
  const int64_t B = x.size(1), H = weights[1].dim() == 2 ? weights[1].size(1) : 0;
  const bool lstm = mode == "LSTM";
  const int64_t gates = gates_of(mode_named(kOp, mode)) * H;
  check_states(kOp, lstm ? h0 : kNone, c0);
  const auto check = [&](const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) {
    check_tensor(t, kOp, name, x.scalar_type(), sizes, device);
  };
  check(x, "x", {x.size(0), B, x.size(2)});
  if (h0.has_value()) check(*h0, "h0", {rows, B, H});
  if (c0.has_value()) check(*c0, "c0", {rows, B, H});
  for (int row = 0; row < rows; ++row) {
    const Tensor* const own = &weights[row * each];
    check(own[0], "w_ih", {gates, row < directions ? x.size(2) : directions * H});
    check(own[1], "w_hh", {gates, H});
    for (int i = 2; i < each; ++i) check(own[i], i == 2 ? "b_ih" : "b_hh", {gates});
  }
  const Tensor h_n = empty({rows, B, H}, x.scalar_type(), device);
  const Tensor c_n = empty({lstm ? rows : 0, B, H}, x.scalar_type(), device);
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
