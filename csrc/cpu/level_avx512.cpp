// Machines with AVX-512 (F, BW, CD, DQ, VL).
#include "cpu/levels.h"

#if LLM_EXT_X86_LEVELS

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define LLM_EXT_LEVEL avx512
#define LLM_EXT_LEVEL_NAME "avx512"
#define LLM_EXT_VECTOR_BYTES 64
#include "cpu/bodies.inl"
#pragma GCC pop_options

namespace llm_ext {
const Kernels& avx512_kernels = avx512::kKernels;
}

#endif
