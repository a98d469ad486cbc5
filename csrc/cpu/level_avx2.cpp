// Machines with AVX2, FMA and what came with them.
#include "cpu/levels.h"

#if LLM_EXT_X86_LEVELS

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define LLM_EXT_LEVEL avx2
#define LLM_EXT_LEVEL_NAME "avx2"
#define LLM_EXT_VECTOR_BYTES 32
#include "cpu/bodies.inl"
#pragma GCC pop_options

namespace llm_ext {
const Kernels& avx2_kernels = avx2::kKernels;
}

#endif
