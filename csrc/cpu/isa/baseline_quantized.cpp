// Weights of 8 and 16 bits on any machine. Without contraction to fused multiply-adds, the gates have the same bits on
// every ISA.
#include "cpu/isa/isa.h"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#define LLM_EXT_ISA_NAMESPACE baseline_quantized
#define LLM_EXT_VECTOR_BYTES 16
#include "cpu/quantized/quantized.inl"
#pragma GCC pop_options

namespace llm_ext {
const QuantizedTables& baseline_quantized_kernels = baseline_quantized::kQuantizedTables;
}
