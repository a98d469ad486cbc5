// The functions of exports.h as ops without tensors, for a Python without the module: llm_ext/_C.py.
#include "exports.h"

#include <optional>
#include <string>
#include <tuple>

#include "torch/stable.h"

namespace llm_ext {
namespace {

std::tuple<std::string, std::string, std::optional<std::string>, bool, std::string> build_info_fields() {
  const BuildInfo info = build_info();
  const std::optional<std::string> cuda = info.cuda ? std::optional<std::string>(info.cuda) : std::nullopt;
  return {info.compiler, info.torch, cuda, info.openmp, info.isa};
}

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&llm_ext::build_info_fields));
  m.impl("packed_weight_cache_bytes", TORCH_BOX(&llm_ext::packed_weight_cache_bytes));
  m.impl("clear_packed_weight_cache", TORCH_BOX(&llm_ext::clear_packed_weight_cache));
  m.impl("cpu_cache_bytes", TORCH_BOX(&llm_ext::cpu_cache_bytes));
  m.impl("empty_cpu_cache", TORCH_BOX(&llm_ext::empty_cpu_cache));
}
