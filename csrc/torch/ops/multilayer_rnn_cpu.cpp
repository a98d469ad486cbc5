// multilayer_rnn_forward on the CPU.
#include "torch/ops/multilayer_rnn_cpu.h"

#include <string>
#include <tuple>
#include <vector>

#include "torch/dtypes.h"
#include "torch/ops/rnn.h"
#include "torch/stable.h"
#include "torch/tensor.h"

namespace llm_ext {
namespace {

std::tuple<Tensor, Tensor, Tensor> multilayer_rnn_forward(const std::string& mode, const Tensor& x,
                                                          const OptionalTensor& h0, const OptionalTensor& c0,
                                                          const std::vector<Tensor>& weights, bool bias,
                                                          bool bidirectional,
                                                          const std::vector<Tensor>& input_projections,
                                                          const OptionalTensor& batch_sizes, bool /*tf32*/) {
  constexpr const char* kOp = "multilayer_rnn_forward";
  const MultilayerRnnArguments a = {kOp,           mode_named(kOp, mode), x,          h0, c0, weights, bias,
                                    bidirectional, input_projections,     batch_sizes};
  const Tensor& typed = input_projections.empty() ? x : input_projections[0];
  return with_type<float, double, BFloat16, Float16>(typed, kOp, "x",
                                                     [&](auto type) { return MultilayerRnn<decltype(type)>(a).run(); });
}

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CPU, m) {
  m.impl("multilayer_rnn_forward", TORCH_BOX(&llm_ext::multilayer_rnn_forward));
}
