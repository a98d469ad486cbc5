// The entry of additive attention in the kernel table.
#pragma once

#include "cpu/attention/backward.inl"
#include "cpu/attention/forward.inl"
#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Pairs times A that are worth one more thread: about 5 us with AVX-512. An exponential counts as three.
constexpr double kAdditiveWorkPerThread = 1.0e5;

template <typename S>
static int additive_threads(const AdditiveAttentionInput<S>& in, int threads) {
  const double pairs = static_cast<double>(in.queries) * in.keys + 3.0 * (in.queries + in.keys);
  return threads_worth(pairs * in.batch * in.attn_dim, kAdditiveWorkPerThread, threads);
}

template <typename S>
static constexpr AdditiveAttentionKernels<S> kAdditiveAttentionKernels = {
    .threads = additive_threads<S>,
    .forward_workspace = additive_forward_workspace<S>,
    .backward_workspace = additive_backward_workspace<S>,
    .forward = additive_forward<S>,
    .backward = additive_backward<S>,
};

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
