// llm_ext._C: what is not a tensor. Ops go through torch.ops, which loading this module registers.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/kernels.h"
#include "memory.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of llm_ext; importing it registers the ops of torch.ops.llm_ext.";
  m.def(
      "simd_level", [] { return std::string(llm_ext::kernels().level); },
      "The instruction level in use: baseline, avx2, avx512 or avx512_bf16.");
  m.def(
      "build_info",
      [] {
        py::dict info;
#if defined(__clang__)
        info["compiler"] = std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
        info["compiler"] = std::string("gcc ") + __VERSION__;
#else
        info["compiler"] = "unknown";
#endif
        info["torch"] = LLM_EXT_TORCH_VERSION;
#ifdef LLM_EXT_CUDA_VERSION
        info["cuda"] = LLM_EXT_CUDA_VERSION;
#else
        info["cuda"] = py::none();
#endif
#ifdef _OPENMP
        info["openmp"] = true;
#else
        info["openmp"] = false;
#endif
        info["simd"] = std::string(llm_ext::kernels().level);
        return info;
      },
      "What the module was built with, and the instruction level in use.");
  m.def("remembered_bytes", &llm_ext::remembered_bytes, "Bytes of the packed weights that are remembered.");
  m.def("cached_bytes", &llm_ext::cached_bytes, "Bytes of memory of large tensors that waits for others.");
  m.def("empty_cache", &llm_ext::empty_cache, "Give the memory that waits for large tensors back to the system.");
  m.def("forget_weights", &llm_ext::forget_weights, "Free the packed weights that are remembered.");
}
