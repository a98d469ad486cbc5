// The kernel table of one ISA. It is constexpr, so that no code of an ISA runs before the ISA is selected.
#pragma once

#include "cpu/attention/additive_attention.inl"
#include "cpu/hash.inl"
#include "cpu/isa/isa.h"
#include "cpu/linear/linear.inl"
#include "cpu/pooling/pooling.inl"
#include "cpu/rnn/linearized.inl"
#include "cpu/rnn/rnn.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

static constexpr Kernels kKernels = {
    LLM_EXT_ISA_NAME,
    hash,
    {kRecurrenceKernels<float>, kRecurrenceKernels<double>, kRecurrenceKernels<BFloat16>, kRecurrenceKernels<Float16>},
    {kLinearizedRecurrenceKernels<float>, kLinearizedRecurrenceKernels<double>},
    {kLinearKernels<float>, kLinearKernels<double>},
    {kPoolKernels<float>, kPoolKernels<double>, kPoolKernels<BFloat16>, kPoolKernels<Float16>},
    {kAdditiveAttentionKernels<float>, kAdditiveAttentionKernels<double>, kAdditiveAttentionKernels<BFloat16>,
     kAdditiveAttentionKernels<Float16>},
    {}};  // the quantized kernels are in files of their own

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
