// The op on several layers, on the CPU.
#include <string>
#include <tuple>
#include <vector>

#include "torch/check.h"
#include "torch/recurrence.h"
#include "torch/stable.h"
#include "torch/stack.h"

namespace llm_ext {
namespace {

std::tuple<Tensor, Tensor, Tensor> stack_forward(const std::string& cell, const Tensor& x, const OptionalTensor& h0,
                                                 const OptionalTensor& c0, const std::vector<Tensor>& weights,
                                                 bool bias, bool bidirectional, const std::vector<Tensor>& tables,
                                                 const OptionalTensor& batch_sizes, bool /*tf32*/) {
  constexpr const char* kOp = "stack_forward";
  const StackArguments a = {kOp, cell_named(kOp, cell), x, h0, c0, weights, bias, bidirectional, tables, batch_sizes};
  return with_type<float, double, BFloat16, Float16>(tables.empty() ? x : tables[0], kOp, "x",
                                                     [&](auto type) { return Stack<decltype(type)>(a).run(); });
}

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CPU, m) { m.impl("stack_forward", TORCH_BOX(&llm_ext::stack_forward)); }
