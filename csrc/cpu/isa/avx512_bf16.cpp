// AVX-512 with BF16 products. Only the bfloat16 recurrences differ from avx512.
#include "cpu/isa/isa.h"

#if LLM_EXT_X86_ISAS

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#define LLM_EXT_ISA_NAMESPACE avx512_bf16
#define LLM_EXT_VECTOR_BYTES 64
#define LLM_EXT_DOT_BF16
#include "cpu/rnn/rnn.inl"
#pragma GCC pop_options

namespace llm_ext {
const RecurrenceKernels<BFloat16>& avx512_bf16_recurrence = avx512_bf16::kRecurrenceKernels<BFloat16>;
}

#endif
