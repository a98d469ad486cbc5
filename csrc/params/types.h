// Types and conventions of the params structs, which describe one call of each op: sizes, pointers and options. Plain
// C++, included by every part of csrc.
//
// Letters:
//   T   time steps                       H   hidden size
//   Tq  queries                          P   size of the state h and of the output: H, or the projection of an LSTM
//   Tk  keys                             G   gates of a cell: 1 Elman, 3 GRU, 4 LSTM
//   B   batch                            D   size of the pooled vectors
//   N   rows: T * B, or the sum of       Dv  size of the values
//       batch_sizes if packed            A   attention size
//   I   input size                       V   rows of an input projection table (the vocabulary)
//   O   output size of a linear layer
//
// Conventions: arrays are dense and row-major unless a stride is named. No two arrays overlap unless a line permits it.
// A pointer may be null only where its line says what null means. "out" marks results.
#pragma once

#include <cstdint>

namespace llm_ext {

// 16-bit floating-point types in memory. Arithmetic converts them to float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type of arithmetic for tensors that are stored as S.
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

// The log-sum-exp of scores in two numbers, max + log(sum): one number of the size of the scores would round away the
// logarithm of the sum. Without scores it is {-inf, 0}.
template <typename T>
struct LogSum {
  T max;  // the largest score
  T sum;  // of exp(score - max)
};

}  // namespace llm_ext
