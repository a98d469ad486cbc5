// llm_ext._C: everything that is not a tensor. Loading the module loads libllm_ext.so, which registers the ops.
#include <pybind11/pybind11.h>

#include "exports.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  const llm_ext::BuildInfo info = llm_ext::build_info();
  py::dict result;
  result["compiler"] = info.compiler;
  result["torch"] = info.torch;
  result["cuda"] = info.cuda;  // a null pointer becomes None
  result["openmp"] = info.openmp;
  result["isa"] = info.isa;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of llm_ext. Importing it registers the ops of torch.ops.llm_ext.";
  m.def("build_info", &build_info, "Return compiler, torch, CUDA and OpenMP of the build, and the ISA in use.");
  m.def("packed_weight_cache_bytes", &llm_ext::packed_weight_cache_bytes,
        "Return the size of the packed weight cache in bytes.");
  m.def("clear_packed_weight_cache", &llm_ext::clear_packed_weight_cache, "Free all cached packed weights.");
  m.def("cpu_cache_bytes", &llm_ext::cpu_cache_bytes,
        "Return the bytes that the CPU caching allocator holds for reuse.");
  m.def("empty_cpu_cache", &llm_ext::empty_cpu_cache,
        "Return the memory that the CPU caching allocator holds for reuse to the system.");
}
