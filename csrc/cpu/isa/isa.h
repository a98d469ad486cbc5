// The tables of all levels, and what the bodies need to be compiled.
//
// A file level_*.cpp includes the bodies once, in a region whose functions may use the level's instructions. Standard
// headers therefore come first, here: an inline function of the standard library compiled inside a region could be
// merged by the linker with everybody else's copy, and would then crash on a machine without that level.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/kernels.h"
#include "cpu/thread_team.h"
#include "params/attention.h"
#include "params/linear.h"
#include "params/pooling.h"
#include "params/rnn.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LLM_EXT_X86_ISAS 1
#include <immintrin.h>
// GCC's own intrinsics start from undefined vectors and draw these warnings wherever they are inlined.
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
#if LLM_EXT_X86_ISAS
extern const Kernels& avx2_kernels;
extern const Kernels& avx512_kernels;
extern const RecurrenceKernels<BFloat16>& avx512_bf16_recurrence;
#endif

}  // namespace llm_ext
