// bidirectional_forward and bidirectional_backward: both directions of a layer in one launch, on NVIDIA GPUs.
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "torch/alloc/empty.h"
#include "torch/device.h"
#include "torch/ops/rnn.h"
#include "torch/ops/rnn_directions_cuda.h"
#include "torch/ops/rnn_layer_cuda.h"
#include "torch/stable.h"
#include "torch/tensor.h"

namespace llm_ext {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> bidirectional_forward(const std::string& mode, const Tensor& x,
                                                                 const OptionalTensor& h0, const OptionalTensor& c0,
                                                                 const std::vector<Tensor>& weights, bool bias,
                                                                 const OptionalTensor& batch_sizes,
                                                                 const OptionalTensor& lengths, bool tf32,
                                                                 bool needs_autograd) {
  const Directions both("bidirectional_forward", mode, x, h0, c0, weights, bias, 2);
  const RnnForwardResults r = forward_layer(
      {both.forward(0, batch_sizes, lengths, tf32), both.forward(1, batch_sizes, lengths, tf32)}, needs_autograd);
  const auto or_nothing = [&](const OptionalTensor& t) { return t ? *t : empty({0}, x.scalar_type(), device_of(x)); };
  return {r.y, r.h_n, or_nothing(r.c_n), or_nothing(r.saved)};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> bidirectional_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
    const std::string& mode, const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
    const std::vector<Tensor>& weights, bool bias, const Tensor& y, const Tensor& saved,
    const OptionalTensor& batch_sizes, const OptionalTensor& lengths, bool tf32, bool need_dx, bool need_dh0,
    bool need_dc0, bool need_dweights) {
  constexpr const char* kOp = "bidirectional_backward";
  const Directions both(kOp, mode, x, h0, c0, weights, bias, 2);
  std::vector<DirectionBackward> given;
  for (int d = 0; d < 2; ++d) {
    RnnBackwardArguments a;
    static_cast<RnnArguments&>(a) = both.arguments(d, batch_sizes, lengths, tf32);
    a.need_dx = need_dx;
    a.need_dh0 = need_dh0;
    a.need_dc0 = need_dc0;
    a.need_dw_ih = a.need_dw_hh = a.need_db_ih = a.need_db_hh = a.need_dw_hr = need_dweights;
    given.push_back(
        {a, both.state_of_direction("grad_h_n", grad_h_n, d), both.state_of_direction("grad_c_n", grad_c_n, d)});
  }
  const OptionalTensor saved_rows =
      saved_blocks(given[0].common.mode, false) > 0 ? OptionalTensor(saved) : std::nullopt;
  const std::vector<RnnBackwardResults> r = backward_layer(given, grad_y, y, saved_rows);
  std::vector<Tensor> dweights;
  for (const RnnBackwardResults& of : r) both.append_gradients(of, dweights);
  return {r[0].dx, r[0].dh0, r[0].dc0, std::move(dweights)};
}

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CUDA, m) {
  m.impl("bidirectional_forward", TORCH_BOX(&llm_ext::bidirectional_forward));
  m.impl("bidirectional_backward", TORCH_BOX(&llm_ext::bidirectional_backward));
}
