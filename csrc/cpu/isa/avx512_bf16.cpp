// Machines with AVX-512 that multiply bfloat16: recurrences of that type, the rest is as for all of AVX-512.
#include "cpu/isa/isa.h"

#if LLM_EXT_X86_ISAS

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#define LLM_EXT_ISA_NAMESPACE avx512_bf16
#define LLM_EXT_VECTOR_BYTES 64
#define LLM_EXT_DOT_BF16
// clang-format off: each body uses those before it
#include "cpu/simd/vec.inl"
#include "cpu/simd/vec_math.inl"
#include "cpu/gemm/gemm.inl"
#include "cpu/gemm/weight_gradients.inl"
#include "cpu/rnn/cells.inl"
#include "cpu/rnn/recurrence.inl"
// clang-format on
#pragma GCC pop_options

namespace llm_ext {
const RecurrenceKernels<BFloat16>& avx512_bf16_recurrence = avx512_bf16::kRecurrenceKernels<BFloat16>;
}

#endif
