// Declares the kernel tables, and includes every header that kernels need.
//
// Each ISA has a source file, which includes this header, opens a region whose functions may use the ISA's
// instructions, and includes the kernels (*.inl) into the namespace of the ISA. Headers come before the region: the
// linker could merge an inline function of the standard library that is compiled inside it with the copies of other
// translation units, and the process would crash on a machine without the ISA.
//
// An .inl file includes every file that it uses. Its `#pragma once` acts per ISA, since each ISA is one translation
// unit.
#pragma once

#ifdef LLM_EXT_ISA_NAMESPACE
#error "cpu/isa/isa.h must be included before the region of the ISA"
#endif

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/kernels.h"
#include "cpu/thread_team.h"
#include "params/attention.h"
#include "params/linear.h"
#include "params/pooling.h"
#include "params/quantized.h"
#include "params/rnn.h"
#include "params/types.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LLM_EXT_X86_ISAS 1
#include <immintrin.h>
// GCC's intrinsics start from undefined vectors and draw these warnings wherever they are inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#else
#define LLM_EXT_X86_ISAS 0
#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#endif

namespace llm_ext {

extern const Kernels& baseline_kernels;
extern const QuantizedTables& baseline_quantized_kernels;
#if LLM_EXT_X86_ISAS
extern const Kernels& avx2_kernels;
extern const Kernels& avx512_kernels;
extern const QuantizedTables& avx2_quantized_kernels;
extern const QuantizedTables& avx_vnni_quantized_kernels;
extern const QuantizedTables& avx512_quantized_kernels;
extern const QuantizedTables& avx512_vnni_quantized_kernels;
extern const QuantizedKernels<BFloat16>& avx512_bf16_quantized_kernels;
extern const RecurrenceKernels<BFloat16>& avx512_bf16_recurrence;
#endif

}  // namespace llm_ext
