// Picks an instruction level at run time.
#include "cpu/isa/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>

namespace llm_ext {
namespace {

struct Level {
  Kernels kernels;
  bool supported;
};

#if LLM_EXT_X86_ISAS
// The parts of x86-64-v3 and -v4 that the compiler may use in level_*.cpp; older compilers cannot ask for the level.
bool has_f16c() {
  unsigned int a, b, c, d;  // not all compilers can ask for it by name
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && has_f16c();
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

Kernels with_bf16(Kernels kernels) {
  kernels.isa = "avx512_bf16";
  std::get<RecurrenceKernels<BFloat16>>(kernels.recurrences) = avx512_bf16_recurrence;
  return kernels;
}
#endif

const Kernels& choose() {
  static const Level levels[] = {
  // From the highest down: the first supported one is the default.
#if LLM_EXT_X86_ISAS
      {with_bf16(avx512_kernels), has_avx512_bf16()},
      {avx512_kernels, has_avx512()},
      {avx2_kernels, has_avx2()},
#endif
      {baseline_kernels, true},
  };
  const char* wanted = std::getenv("LLM_EXT_ISA");
  std::string names;
  for (const Level& level : levels) {
    if (wanted == nullptr || *wanted == '\0') {
      if (level.supported) return level.kernels;
    } else if (std::strcmp(wanted, level.kernels.isa) == 0) {
      if (level.supported) return level.kernels;
      throw std::runtime_error("llm_ext: LLM_EXT_ISA=" + std::string(wanted) + " is not supported by this machine");
    }
    names += std::string(names.empty() ? "" : ", ") + level.kernels.isa;
  }
  throw std::runtime_error("llm_ext: LLM_EXT_ISA must be one of " + names + ", got " + std::string(wanted));
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& table = choose();
  return table;
}

}  // namespace llm_ext
