// y = x W^T + b with packed weights of 8 or 16 bits.
#pragma once

#include "cpu/gemm/blocking.inl"
#include "cpu/isa/isa.h"
#include "cpu/quantized/product.inl"
#include "cpu/ranges.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

template <typename W>
static int64_t quantized_linear_workspace(const LinearSizes& s, int threads) {
  return threads * blocked_space<InputProduct<W>>(s.rows, s.input);
}

static int quantized_linear_threads(const LinearSizes& s, int threads) {
  return threads_worth(static_cast<double>(s.rows) * s.input * s.output, kQuantizedWorkPerThread, threads);
}

template <typename W>
static void quantized_linear(const QuantizedLinearParams<W>& p, const ThreadTeam& team) {
  const LinearSizes s = p.sizes;
  const auto slice = slice_product(s.rows, divide_up(s.output, kQuantizedPanel), team);
  float* space =
      p.workspace == nullptr ? nullptr : p.workspace + team.rank * blocked_space<InputProduct<W>>(s.rows, s.input);
  float* y = p.y + slice.rows.begin * s.output;
  blocked_product<InputProduct<W>, 1>(p.x + slice.rows.begin * s.input, slice.rows.size(), s.input, p.w, s.output,
                                      slice.panels, space,
                                      [&](int64_t row, int64_t col, Vec<float>(&value)[1], int lanes) {
                                        if (p.b != nullptr) value[0] += load_partial(p.b + col, lanes);
                                        store_partial(y + row * s.output + col, value[0], lanes);
                                      });
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
