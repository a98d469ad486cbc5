// Includes the kernel bodies once per instruction level and picks a level at run time.
//
// Inside a region every function may use the level's instructions. Standard headers therefore come first: an inline
// function of the standard library compiled inside a region could be merged by the linker with everybody else's copy,
// and would then crash on a machine without that level.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "cpu/team.h"
#include "params.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LLM_EXT_X86_LEVELS 1
#include <immintrin.h>
// GCC's own intrinsics start from undefined vectors and draw these warnings wherever they are inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#else
#define LLM_EXT_X86_LEVELS 0
#endif

#define LLM_EXT_LEVEL baseline
#define LLM_EXT_LEVEL_NAME "baseline"
#define LLM_EXT_VECTOR_BYTES 16
#include "cpu/bodies.inl"
#undef LLM_EXT_LEVEL
#undef LLM_EXT_LEVEL_NAME
#undef LLM_EXT_VECTOR_BYTES

#if LLM_EXT_X86_LEVELS

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define LLM_EXT_LEVEL avx2
#define LLM_EXT_LEVEL_NAME "avx2"
#define LLM_EXT_VECTOR_BYTES 32
#include "cpu/bodies.inl"
#undef LLM_EXT_LEVEL
#undef LLM_EXT_LEVEL_NAME
#undef LLM_EXT_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define LLM_EXT_LEVEL avx512
#define LLM_EXT_LEVEL_NAME "avx512"
#define LLM_EXT_VECTOR_BYTES 64
#include "cpu/bodies.inl"
#undef LLM_EXT_LEVEL
#undef LLM_EXT_LEVEL_NAME
#undef LLM_EXT_VECTOR_BYTES
#pragma GCC pop_options

#endif

namespace llm_ext {
namespace {

struct Level {
  const Kernels& kernels;
  bool supported;
};

#if LLM_EXT_X86_LEVELS
// The parts of x86-64-v3 and -v4 that the compiler may use in the regions above; older compilers cannot ask for the
// level.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Kernels& choose() {
  static const Level levels[] = {
  // From the highest down: the first supported one is the default.
#if LLM_EXT_X86_LEVELS
      {avx512::kKernels, has_avx512()},
      {avx2::kKernels, has_avx2()},
#endif
      {baseline::kKernels, true},
  };
  const char* wanted = std::getenv("LLM_EXT_SIMD");
  std::string names;
  for (const Level& level : levels) {
    if (wanted == nullptr || *wanted == '\0') {
      if (level.supported) return level.kernels;
    } else if (std::strcmp(wanted, level.kernels.level) == 0) {
      if (level.supported) return level.kernels;
      throw std::runtime_error("llm_ext: LLM_EXT_SIMD=" + std::string(wanted) + " is not supported by this machine");
    }
    names += std::string(names.empty() ? "" : ", ") + level.kernels.level;
  }
  throw std::runtime_error("llm_ext: LLM_EXT_SIMD must be one of " + names + ", got " + std::string(wanted));
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& table = choose();
  return table;
}

}  // namespace llm_ext
