// AVX2 and FMA, with the rest of x86-64-v3.
#include "cpu/isa/isa.h"

#if LLM_EXT_X86_ISAS

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define LLM_EXT_ISA_NAMESPACE avx2
#define LLM_EXT_ISA_NAME "avx2"
#define LLM_EXT_VECTOR_BYTES 32
#include "cpu/isa/kernel_table.inl"
#pragma GCC pop_options

namespace llm_ext {
const Kernels& avx2_kernels = avx2::kKernels;
}

#endif
