// llm_ext._C: everything that is not a tensor. Loading the module registers the ops, which go through torch.ops.
#include <pybind11/pybind11.h>

#include <string>

#include "caches.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
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
  info["isa"] = llm_ext::kernels().isa;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of llm_ext. Importing it registers the ops of torch.ops.llm_ext.";
  m.def(
      "isa", [] { return llm_ext::kernels().isa; },
      "Return the ISA of the CPU kernels in use: baseline, avx2, avx512 or avx512_bf16.");
  m.def("build_info", &build_info, "Return compiler, torch, CUDA and OpenMP of the build, and the ISA in use.");
  m.def("packed_weight_cache_bytes", &llm_ext::packed_weight_cache_bytes,
        "Return the size of the packed weight cache in bytes.");
  m.def("clear_packed_weight_cache", &llm_ext::clear_packed_weight_cache, "Free all cached packed weights.");
  m.def("cpu_cache_bytes", &llm_ext::cpu_cache_bytes,
        "Return the bytes that the CPU caching allocator holds for reuse.");
  m.def("empty_cpu_cache", &llm_ext::empty_cpu_cache,
        "Return the memory that the CPU caching allocator holds for reuse to the system.");
}
