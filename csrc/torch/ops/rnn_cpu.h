// CPU only: shared by the ops that run recurrences.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "params/rnn.h"
#include "torch/ops/rnn.h"

namespace llm_ext {

// Without steps the last state is the initial state; likewise for gradients. `from` null: zeros; `to` null: not wanted.
template <typename S>
void copy_state(int64_t elements, const S* from, S* to) {
  if (to == nullptr) return;
  if (from != nullptr) {
    std::memcpy(to, from, elements * sizeof(S));
  } else {
    std::memset(to, 0, elements * sizeof(S));
  }
}

}  // namespace llm_ext
