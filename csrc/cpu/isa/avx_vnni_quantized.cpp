// Weights of 8 and 16 bits on AVX2 with AVX-VNNI, of machines without AVX-512. Without contraction: see
// baseline_quantized.cpp.
#include "cpu/isa/isa.h"

#if LLM_EXT_X86_ISAS

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3,avxvnni")
#pragma GCC optimize("fp-contract=off")
#define LLM_EXT_ISA_NAMESPACE avx_vnni_quantized
#define LLM_EXT_VNNI
#define LLM_EXT_VECTOR_BYTES 32
#include "cpu/quantized/quantized.inl"
#pragma GCC pop_options

namespace llm_ext {
const QuantizedTables& avx_vnni_quantized_kernels = avx_vnni_quantized::kQuantizedTables;
}

#endif
