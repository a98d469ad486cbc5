// Selects the kernel table at run time.
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

struct Isa {
  Kernels kernels;
  bool supported;
};

Kernels with_quantized(Kernels kernels, const QuantizedTables& quantized) {
  kernels.quantizeds = quantized;
  return kernels;
}

#if LLM_EXT_X86_ISAS
// The features of x86-64-v3 and x86-64-v4, which isa/avx*.cpp enable. They are queried one by one, because older
// compilers do not accept "x86-64-v3" here.
bool has_f16c() {
  unsigned int a, b, c, d;  // by cpuid: older compilers do not accept "f16c"
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

// VNNI has no ISA of its own: results have the same bits with and without it.
const QuantizedTables& avx512_quantized() {
  const bool vnni = has_avx512() && __builtin_cpu_supports("avx512vnni");
  return vnni ? avx512_vnni_quantized_kernels : avx512_quantized_kernels;
}
const QuantizedTables& avx2_quantized() {
  constexpr unsigned int kAvxVnni = 1u << 4;  // by cpuid: older compilers do not accept "avxvnni"
  unsigned int a, b, c, d;
  const bool vnni = has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & kAvxVnni) != 0;
  return vnni ? avx_vnni_quantized_kernels : avx2_quantized_kernels;
}

Kernels with_bf16(Kernels kernels) {
  kernels.isa = "avx512_bf16";
  std::get<RecurrenceKernels<BFloat16>>(kernels.recurrences) = avx512_bf16_recurrence;
  std::get<QuantizedKernels<BFloat16>>(kernels.quantizeds) = avx512_bf16_quantized_kernels;
  return kernels;
}
#endif

const Kernels& select() {
  // Best first: the default is the first that the machine supports.
  static const Isa isas[] = {
#if LLM_EXT_X86_ISAS
      {with_bf16(with_quantized(avx512_kernels, avx512_quantized())), has_avx512_bf16()},
      {with_quantized(avx512_kernels, avx512_quantized()), has_avx512()},
      {with_quantized(avx2_kernels, avx2_quantized()), has_avx2()},
#endif
      {with_quantized(baseline_kernels, baseline_quantized_kernels), true},
  };
  const char* requested = std::getenv("LLM_EXT_ISA");
  std::string names;
  for (const Isa& isa : isas) {
    if (requested == nullptr || *requested == '\0') {
      if (isa.supported) return isa.kernels;
    } else if (std::strcmp(requested, isa.kernels.isa) == 0) {
      if (isa.supported) return isa.kernels;
      throw std::runtime_error("llm_ext: LLM_EXT_ISA=" + std::string(requested) + " is not supported by this machine");
    }
    names += std::string(names.empty() ? "" : ", ") + isa.kernels.isa;
  }
  throw std::runtime_error("llm_ext: LLM_EXT_ISA must be one of " + names + ", got " + std::string(requested));
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& selected = select();
  return selected;
}

}  // namespace llm_ext
