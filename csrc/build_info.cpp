#include "cpu/kernels.h"
#include "exports.h"

namespace llm_ext {

BuildInfo build_info() {
  BuildInfo info{};
#if defined(__clang__)
  info.compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
  info.compiler = "gcc " __VERSION__;
#else
  info.compiler = "unknown";
#endif
  info.torch = LLM_EXT_TORCH_VERSION;
#ifdef LLM_EXT_CUDA_VERSION
  info.cuda = LLM_EXT_CUDA_VERSION;
#endif
#ifdef _OPENMP
  info.openmp = true;
#endif
  info.isa = kernels().isa;
  return info;
}

}  // namespace llm_ext
