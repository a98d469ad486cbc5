// Weights of 8 and 16 bits on AVX2, without contraction: see baseline_quantized.cpp.
#include "cpu/isa/isa.h"

#if LLM_EXT_X86_ISAS

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#pragma GCC optimize("fp-contract=off")
#define LLM_EXT_ISA_NAMESPACE avx2_quantized
#define LLM_EXT_VECTOR_BYTES 32
#include "cpu/quantized/quantized.inl"
#pragma GCC pop_options

namespace llm_ext {
const QuantizedTables& avx2_quantized_kernels = avx2_quantized::kQuantizedTables;
}

#endif
