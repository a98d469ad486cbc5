// AVX-512 (F, BW, CD, DQ, VL): x86-64-v4.
#include "cpu/isa/isa.h"

#if LLM_EXT_X86_ISAS

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define LLM_EXT_ISA_NAMESPACE avx512
#define LLM_EXT_ISA_NAME "avx512"
#define LLM_EXT_VECTOR_BYTES 64
#include "cpu/isa/kernel_table.inl"
#pragma GCC pop_options

namespace llm_ext {
const Kernels& avx512_kernels = avx512::kKernels;
}

#endif
