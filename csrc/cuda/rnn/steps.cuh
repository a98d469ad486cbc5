// One step of n adjacent units of one row: its loads, arithmetic and stores, given the product of the state. Shared by
// all kernels, which differ in how they compute the product.
#pragma once

#include "cuda/device.cuh"
#include "cuda/rnn/cells.cuh"
#include "cuda/rnn/launchers.h"
#include "cuda/word_pack.cuh"

namespace llm_ext {
namespace cuda {

template <int n, typename S>
LLM_EXT_DEVICE WordPack<S, n> load(const S* from) {
  WordPack<S, n> pack;
  pack.load(from);
  return pack;
}

// n numbers; zeros if base is null.
template <int n, typename S>
LLM_EXT_DEVICE WordPack<S, n> load_or_zeros(const S* base, int64_t index) {
  WordPack<S, n> pack;
  if (base != nullptr) pack.load(base + index);
  return pack;
}

template <int n, typename S>
LLM_EXT_DEVICE void store(S* to, const Compute<S> (&values)[n]) {
  WordPack<S, n> rounded;
#pragma unroll
  for (int e = 0; e < n; ++e) rounded.set(e, narrow<S>(values[e]));
  rounded.store(to);
}

// Steps of batch row b. Lengths out of range are clamped, so that no access leaves an array.
LLM_EXT_DEVICE int length_of(const RecurrenceShape& shape, int64_t b) {
  const int steps = static_cast<int>(shape.steps);
  if (shape.lengths != nullptr) {
    const int64_t length = shape.lengths[b];
    return length < 0 ? 0 : (length > steps ? steps : static_cast<int>(length));
  }
  if (shape.row_offsets == nullptr) return steps;
  int low = 0, high = steps;  // binary search for the first step without row b: batch sizes never increase
  while (low < high) {
    const int middle = (low + high) / 2;
    if (shape.row_offsets[middle + 1] - shape.row_offsets[middle] > b) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The row of the sequence in which batch row b has its s-th step, counted in the row's own time: all rows start at s =
// 0 in both directions, and end at their lengths.
LLM_EXT_DEVICE int64_t sequence_row(const RecurrenceShape& shape, bool reverse, int64_t b, int length, int s) {
  const int t = reverse ? length - 1 - s : s;
  return (shape.row_offsets != nullptr ? shape.row_offsets[t] : t * shape.batch) + b;
}

template <typename C, typename S, int n>
struct ForwardStep {
  WordPack<S, n> gates[C::kGates];

  LLM_EXT_DEVICE void load_at(const RecurrenceShape& shape, const ForwardDirection<S>& d, int64_t row, int unit) {
    const S* at = d.gates_x + row * (C::kGates * shape.hidden) + unit;
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) gates[g] = load<n>(at + g * shape.hidden);
  }

  // Computes gates and the state h (before its projection, if any) from the product of the state, [gate][unit]; c is in
  // and out. Accesses no memory, so that several steps can be interleaved.
  LLM_EXT_DEVICE void compute(const C& cell, const Compute<S> (&product)[C::kGates][n], const Compute<S> (&h_before)[n],
                              Compute<S> (&c)[n], Compute<S> (&blocks)[C::kBlocks][n], Compute<S> (&h)[n]) const {
    using T = Compute<S>;
#pragma unroll
    for (int e = 0; e < n; ++e) {
      T of_unit[C::kBlocks];
#pragma unroll
      for (int b = 0; b < C::kBlocks; ++b) {
        of_unit[b] = b < C::kGates ? gates[input_gate<C>(b)][e] : T(0);
        if (b >= C::kBlocks - C::kGates) of_unit[b] += product[state_gate<C>(b)][e];
      }
      h[e] = cell.forward(of_unit, h_before[e], c[e]);
#pragma unroll
      for (int b = 0; b < C::kBlocks; ++b) blocks[b][e] = of_unit[b];
    }
  }

  // Writes the saved activations.
  LLM_EXT_DEVICE static void save(const RecurrenceShape& shape, const ForwardDirection<S>& d, int64_t row, int unit,
                                  const Compute<S> (&blocks)[C::kBlocks][n], const Compute<S> (&c)[n],
                                  const Compute<S> (&h)[n]) {
    if constexpr (C::kSaved > 0) {
      if (d.saved == nullptr) return;
      const bool projected = shape.output != shape.hidden;
      S* at = d.saved + row * ((C::kSaved + projected) * shape.hidden) + unit;
#pragma unroll
      for (int b = 0; b < C::kBlocks; ++b) store<n>(at + b * shape.hidden, blocks[b]);
      if constexpr (C::kHasCell) store<n>(at + C::kBlocks * shape.hidden, c);
      if (projected) store<n>(at + C::kSaved * shape.hidden, h);
    }
  }
};

template <typename C, typename S, int n>
struct BackwardStep {
  WordPack<S, n> saved[C::kSaved > 0 ? C::kSaved : 1];  // Elman: the output
  WordPack<S, n> before;                                // GRU: the previous state; LSTM: the previous cell state

  LLM_EXT_DEVICE void load_at(const RecurrenceShape& shape, const BackwardDirection<S>& d, int64_t b, int length, int s,
                              int64_t row, int unit) {
    const int64_t hidden = shape.hidden;
    if constexpr (C::kSaved > 0) {
      const int64_t width = (C::kSaved + (shape.output != shape.hidden)) * hidden;
#pragma unroll
      for (int k = 0; k < C::kSaved; ++k) saved[k] = load<n>(d.saved + row * width + k * hidden + unit);
      const int64_t row_before = s > 0 ? sequence_row(shape, d.reverse, b, length, s - 1) : 0;
      if constexpr (C::kHasCell) {
        before = s > 0 ? load<n>(d.saved + row_before * width + C::kBlocks * hidden + unit)
                       : load_or_zeros<n>(d.c0, b * hidden + unit);
      } else {
        before = s > 0 ? load<n>(d.y + row_before * d.y_stride + unit) : load_or_zeros<n>(d.h0, b * hidden + unit);
      }
    } else {
      saved[0] = load<n>(d.y + row * d.y_stride + unit);
    }
  }

  // Computes dz from dh, the gradient of the state before its projection; carry is in and out. Accesses no memory.
  LLM_EXT_DEVICE void compute(const C& cell, const Compute<S> (&dh)[n], Compute<S> (&carry)[n],
                              Compute<S> (&dz)[C::kBlocks][n]) const {
    using T = Compute<S>;
#pragma unroll
    for (int e = 0; e < n; ++e) {
      T blocks[C::kBlocks];
#pragma unroll
      for (int b = 0; b < C::kBlocks; ++b) blocks[b] = saved[b][e];
      const T last = saved[C::kSaved > 0 ? C::kSaved - 1 : 0][e];  // Elman: h, LSTM: c
      const T previous = C::kSaved > 0 ? before[e] : T(0);
      cell.backward(blocks, last, previous, last, previous, dh[e], carry[e]);
#pragma unroll
      for (int b = 0; b < C::kBlocks; ++b) dz[b][e] = blocks[b];
    }
  }

  LLM_EXT_DEVICE static void write(const RecurrenceShape& shape, const BackwardDirection<S>& d, int64_t row, int unit,
                                   const Compute<S> (&dz)[C::kBlocks][n]) {
    S* at = d.dz + row * (C::kBlocks * shape.hidden) + unit;
#pragma unroll
    for (int b = 0; b < C::kBlocks; ++b) store<n>(at + b * shape.hidden, dz[b]);
  }
};

// Zeroes columns [from, to) of batch row b's rows beyond its length; the warps of the block share the rows.
template <typename S>
LLM_EXT_DEVICE void clear_beyond(const RecurrenceShape& shape, int64_t b, int length, S* out, int64_t stride,
                                 int64_t from, int64_t to) {
  if (shape.row_offsets != nullptr) return;
  for (int64_t t = length + warp_index(); t < shape.steps; t += warp_count()) {
    S* row = out + (t * shape.batch + b) * stride;
    for (int64_t i = from + lane_index(); i < to; i += kWarpThreads) row[i] = S{};
  }
}

}  // namespace cuda
}  // namespace llm_ext
