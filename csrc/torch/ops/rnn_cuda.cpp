// rnn_*, gru_* and lstm_* on NVIDIA GPUs: one direction of a layer.
#include <vector>

#include "torch/ops/rnn.h"
#include "torch/ops/rnn_layer_cuda.h"
#include "torch/stable.h"

namespace llm_ext {
namespace {

struct Cuda {
  static RnnForwardResults forward(const RnnForwardArguments& a) {
    return forward_layer({DirectionForward{a, *a.b_ih, *a.b_hh}}, a.needs_autograd);
  }

  static RnnBackwardResults backward(const RnnBackwardArguments& a) {
    const OptionalTensor saved = a.saved != nullptr ? OptionalTensor(*a.saved) : std::nullopt;
    return backward_layer({DirectionBackward{a, *a.grad_h_n, *a.grad_c_n}}, *a.grad_y, *a.y, saved)[0];
  }
};

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CUDA, m) { llm_ext::register_rnn_ops<llm_ext::Cuda>(m); }
