// The entry of pooling and prefix pooling in the kernel table.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/pooling/common.inl"
#include "cpu/pooling/pool_backward.inl"
#include "cpu/pooling/pool_forward.inl"
#include "cpu/pooling/prefix_backward.inl"
#include "cpu/pooling/prefix_common.inl"
#include "cpu/pooling/prefix_forward.inl"
#include "cpu/ranges.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Elements of e that are worth one more thread. Zen 3: docs/lab/cpu-constants.md.
constexpr double kPoolWorkPerThread = 1.0e4;

template <typename S>
static int pool_threads(const PoolInput<S>& in, int threads) {
  return threads_worth(static_cast<double>(in.batch) * in.steps * in.dim, kPoolWorkPerThread, threads);
}

template <typename S>
static constexpr PoolKernels<S> kPoolKernels = {
    .threads = pool_threads<S>,
    .workspace = pool_workspace<S>,
    .forward = pool_forward<S>,
    .backward = pool_backward<S>,
    .prefix_workspace = prefix_pool_workspace<S>,
    .prefix_forward = prefix_pool_forward<S>,
    .prefix_backward = prefix_pool_backward<S>,
};

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
