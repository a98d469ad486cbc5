// Weights of 8 and 16 bits on AVX-512 with VNNI, which adds the products of four bytes, or of two int16, to a sum in
// one instruction. Without contraction: see baseline_quantized.cpp.
#include "cpu/isa/isa.h"

#if LLM_EXT_X86_ISAS

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vnni")
#pragma GCC optimize("fp-contract=off")
#define LLM_EXT_ISA_NAMESPACE avx512_vnni_quantized
#define LLM_EXT_VNNI
#define LLM_EXT_VECTOR_BYTES 64
#include "cpu/quantized/quantized.inl"
#pragma GCC pop_options

namespace llm_ext {
const QuantizedTables& avx512_vnni_quantized_kernels = avx512_vnni_quantized::kQuantizedTables;
}

#endif
