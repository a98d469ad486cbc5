// What one call of each op is: sizes, pointers, options. Plain C++; every room reads it.
//
// Letters: T time, Tq queries, Tk keys, B batch, I input size, H hidden size, P size of the state h and of the output
// (H, or smaller where an LSTM projects), G gates, O output size of an affine map, D embedding size, Dv that of values,
// A attention size. N is the number of rows of a sequence laid out one step after the other: T * B, or fewer where
// packed sequences end early. All arrays are dense and row-major unless a stride is named; no two may overlap unless
// the line says so; null only where the line says so.
#pragma once

#include <cstdint>

namespace llm_ext {

// Numbers of 16 bits, as they lie in memory; nothing is computed in them.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What numbers that are stored as S are computed in.
template <typename S>
struct ComputeType {
  using type = S;
};
template <>
struct ComputeType<BFloat16> {
  using type = float;
};
template <>
struct ComputeType<Float16> {
  using type = float;
};
template <typename S>
using Compute = typename ComputeType<S>::type;

}  // namespace llm_ext
