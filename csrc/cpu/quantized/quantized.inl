// The entries of weights of 8 and 16 bits in the kernel table.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/quantized/linear.inl"
#include "cpu/quantized/recurrence.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

template <typename W>
static constexpr QuantizedKernels<W> kQuantizedKernels = {
    .recurrence_threads = quantized_recurrence_threads,
    .recurrence_workspace = quantized_recurrence_workspace<W>,
    .recurrence = quantized_recurrence<W>,
    .linear_threads = quantized_linear_threads,
    .linear_workspace = quantized_linear_workspace<W>,
    .linear = quantized_linear<W>,
};
static constexpr QuantizedTables kQuantizedTables = {kQuantizedKernels<int8_t>, kQuantizedKernels<BFloat16>};

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
