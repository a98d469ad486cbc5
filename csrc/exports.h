// The functions of libllm_ext.so beside its ops. Python calls them through module.cpp, or else torch/ops/exports.cpp.
#pragma once

#include <cstdint>

// The library is compiled with hidden symbols.
#define LLM_EXT_EXPORT __attribute__((visibility("default")))

namespace llm_ext {

struct BuildInfo {
  const char* compiler;
  const char* torch;
  const char* cuda;  // null: built without CUDA
  bool openmp;
  const char* isa;  // of the CPU kernels in use
};

LLM_EXT_EXPORT BuildInfo build_info();

// The cache of csrc/torch/weight_cache/packed_weight_cache.h.
LLM_EXT_EXPORT int64_t packed_weight_cache_bytes();
LLM_EXT_EXPORT void clear_packed_weight_cache();

// The cache of csrc/torch/alloc/cpu_caching_allocator.h.
LLM_EXT_EXPORT int64_t cpu_cache_bytes();
LLM_EXT_EXPORT void empty_cpu_cache();

}  // namespace llm_ext
