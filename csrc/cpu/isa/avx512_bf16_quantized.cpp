// Weights of 16 bits on AVX-512 with BF16 products. Without contraction: see baseline_quantized.cpp.
#include "cpu/isa/isa.h"

#if LLM_EXT_X86_ISAS

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#pragma GCC optimize("fp-contract=off")
#define LLM_EXT_ISA_NAMESPACE avx512_bf16_quantized
#define LLM_EXT_VECTOR_BYTES 64
#define LLM_EXT_DOT_BF16
#include "cpu/quantized/quantized.inl"
#pragma GCC pop_options

namespace llm_ext {
const QuantizedKernels<BFloat16>& avx512_bf16_quantized_kernels = avx512_bf16_quantized::kQuantizedKernels<BFloat16>;
}

#endif
