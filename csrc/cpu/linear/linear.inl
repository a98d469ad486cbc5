// The entry of linear layers in the kernel table.
#pragma once

#include "cpu/gemm/blocking.inl"
#include "cpu/isa/isa.h"
#include "cpu/linear/backward.inl"
#include "cpu/linear/forward.inl"
#include "cpu/ranges.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

static int linear_threads(const LinearSizes& s, int threads) {
  return threads_worth(static_cast<double>(s.rows) * s.input * s.output, kWorkPerThread, threads);
}

template <typename S>
static constexpr LinearKernels<S> kLinearKernels = {
    .threads = linear_threads,
    .forward_workspace = linear_forward_workspace<S>,
    .argmax_workspace = linear_argmax_workspace<S>,
    .backward_workspace = linear_backward_workspace<S>,
    .forward = linear_forward<S>,
    .argmax = linear_argmax<S>,
    .backward = linear_backward<S>,
};

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
