// Replaces csrc/torch/tensor.h where the weight cache is compiled without torch: a tensor is some shared memory.
#pragma once

#include <memory>
#include <optional>
#include <vector>

namespace llm_ext {

using Tensor = std::shared_ptr<std::vector<char>>;
using OptionalTensor = std::optional<Tensor>;

}  // namespace llm_ext
