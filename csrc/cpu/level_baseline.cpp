// Any machine: vectors of 16 bytes.
#include "cpu/levels.h"

#define LLM_EXT_LEVEL baseline
#define LLM_EXT_LEVEL_NAME "baseline"
#define LLM_EXT_VECTOR_BYTES 16
#include "cpu/bodies.inl"

namespace llm_ext {
const Kernels& baseline_kernels = baseline::kKernels;
}
