// llm_ext._C: what is not a tensor. Ops go through torch.ops, which loading this module registers.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/kernels.h"
#include "caches.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of llm_ext; importing it registers the ops of torch.ops.llm_ext.";
  m.def(
      "isa", [] { return std::string(llm_ext::kernels().isa); },
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
        info["isa"] = std::string(llm_ext::kernels().isa);
        return info;
      },
      "What the module was built with, and the instruction level in use.");
  m.def("packed_weight_cache_bytes", &llm_ext::packed_weight_cache_bytes, "Bytes of the packed weights that are remembered.");
  m.def("cpu_cache_bytes", &llm_ext::cpu_cache_bytes, "Bytes of memory of large tensors that waits for others.");
  m.def("empty_cpu_cache", &llm_ext::empty_cpu_cache, "Give the memory that waits for large tensors back to the system.");
  m.def("clear_packed_weight_cache", &llm_ext::clear_packed_weight_cache, "Free the packed weights that are remembered.");
}
