// Any machine: vectors of 16 bytes.
#include "cpu/isa/isa.h"

#define LLM_EXT_ISA_NAMESPACE baseline
#define LLM_EXT_ISA_NAME "baseline"
#define LLM_EXT_VECTOR_BYTES 16
#include "cpu/isa/kernel_table.inl"

namespace llm_ext {
const Kernels& baseline_kernels = baseline::kKernels;
}
