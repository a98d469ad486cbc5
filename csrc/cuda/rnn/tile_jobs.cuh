// The two passes of the tile kernel (tiles.cuh): the operands of their products, and the step that follows.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/rnn/arithmetic.cuh"
#include "cuda/rnn/cells.cuh"
#include "cuda/rnn/launchers.h"
#include "cuda/rnn/steps.cuh"
#include "cuda/rnn/tiles.h"

namespace llm_ext {
namespace cuda {

constexpr int kUnits = 2;       // per thread
constexpr int kOwnRows = 2;     // batch rows per thread
constexpr int kStepsAhead = 2;  // distance of the prefetch into L2; not tuned

// A batch row; length is -1 for rows beyond the batch.
struct Row {
  int b;
  int length;
};

// Per thread: its rows of a tile, its elements of a product (unit e of row i at 2 e + i), and the values it carries
// from step to step (unit e of row i at 2 i + e).
struct OwnRows {
  int first_b;
  int length[kOwnRows];
};
using Sums = float[kUnits * kOwnRows];
using Carried = Pack<float, kUnits * kOwnRows>;

// Forward: the weight tiles are the gates of a unit group; the sum runs over h.
template <typename A, typename C>
struct ForwardJob {
  using Arithmetic = A;
  using S = typename A::Stored;
  using Call = RecurrenceForward<S>;
  static constexpr Pass kPass = Pass::kForward;
  static constexpr int kTiles = C::kGates;
  static constexpr int kOperands = 1;  // blocks of H operands per row
  struct Operands {
    WordPack<typename A::Operand, kUnits> at[kOperands];
  };
  static constexpr bool kCarries = C::kReadsState || C::kHasCell;
  // Whether there are registers for the bias during the product: exact float32 has none for four gates.
  static constexpr bool kBiasAhead = !std::is_same_v<A, FloatArithmetic> || C::kGates < 4;
  static constexpr int kExtraSteps = 0;

  const RecurrenceShape& shape;
  const ForwardDirection<S>& d;
  int hidden;
  int unit;  // the thread's first
  C cell;

  struct Inputs {
    int64_t sequence_row;
    ForwardStep<C, S, kUnits> step;
  };
  struct Bias {
    WordPack<S, kUnits> at[kTiles];
  };

  LLM_EXT_DEVICE ForwardJob(const Call& call, int first_unit)
      : shape(call.shape),
        d(call.direction[block_z()]),
        hidden(static_cast<int>(call.shape.hidden)),
        unit(first_unit),
        cell{call.shape.mode} {}

  // The step, in the time of each row, that all rows run in iteration i; and the iterations of a tile before i.
  LLM_EXT_DEVICE static int step_of(int i, int /*steps*/) { return i; }
  LLM_EXT_DEVICE static int passes_before(int i, int /*steps*/, int /*tile_steps*/) { return i; }

  // The element of U in row (tile, row_unit).
  LLM_EXT_DEVICE float weight(int tile, int row_unit, int /*block*/, int column) const {
    if (row_unit >= hidden || column >= hidden) return 0.0f;
    return widen(d.w_hh[(tile * shape.hidden + row_unit) * shape.hidden + column]);
  }

  // The operands of the first product.
  LLM_EXT_DEVICE float first_operand(const Row& row, int /*block*/, int column) const {
    if (row.length < 0 || column >= hidden || d.h0 == nullptr) return 0.0f;
    return widen(d.h0[row.b * shape.hidden + column]);
  }

  LLM_EXT_DEVICE void clear(const Row& row, int from, int to) const {
    clear_beyond(shape, row.b, row.length, d.y, d.y_stride, from, to);
  }

  LLM_EXT_DEVICE void start(const Row& row, float (&carried)[kUnits]) const {
    const int64_t at = row.b * shape.hidden + unit;
    const WordPack<S, kUnits> h0 = load_or_zeros<kUnits>(d.h0, at);
    WordPack<S, kUnits> c0;
    if constexpr (C::kHasCell) c0 = load_or_zeros<kUnits>(d.c0, at);
#pragma unroll
    for (int e = 0; e < kUnits; ++e) carried[e] = C::kHasCell ? c0[e] : h0[e];
    if (row.length > 0) return;
    h0.store(d.h_n + at);
    if constexpr (C::kHasCell) c0.store(d.c_n + at);
  }

  // At every step, so that the bias occupies no registers between them.
  LLM_EXT_DEVICE void load_bias(Bias& bias) const {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) bias.at[t] = load_or_zeros<kUnits>(d.b_hh, t * shape.hidden + unit);
  }

  LLM_EXT_DEVICE void load_inputs(const Row& row, int s, Inputs& inputs) const {
    inputs.sequence_row = sequence_row(shape, d.reverse, row.b, row.length, s);
    inputs.step.load_at(shape, d, inputs.sequence_row, unit);
  }

  LLM_EXT_DEVICE void fetch_ahead(const Row& row, int s) const {
    if (s + kStepsAhead >= row.length) return;
    const int64_t n = sequence_row(shape, d.reverse, row.b, row.length, s + kStepsAhead);
    const S* at = d.gates_x + n * (C::kGates * shape.hidden) + unit;
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) prefetch(at + g * shape.hidden);
  }

  // Computes the steps of both rows interleaved to hide latency, and writes the active ones.
  LLM_EXT_DEVICE void run(const OwnRows& rows, int s, const Bias& bias, const Inputs (&inputs)[kOwnRows],
                          const Sums (&sums)[kTiles], Carried& carried, Operands (&operands)[kOwnRows]) const {
    float blocks[kOwnRows][C::kBlocks][kUnits], c[kOwnRows][kUnits], h[kOwnRows][kUnits];
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      float product[kTiles][kUnits], h_before[kUnits];
#pragma unroll
      for (int e = 0; e < kUnits; ++e) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) product[t][e] = sums[t][kOwnRows * e + i] + bias.at[t][e];
        c[i][e] = h_before[e] = carried.at[kUnits * i + e];
      }
      inputs[i].step.compute(cell, product, h_before, c[i], blocks[i], h[i]);
    }
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      if (s >= rows.length[i]) continue;
#pragma unroll
      for (int e = 0; e < kUnits; ++e) {
        carried.at[kUnits * i + e] = C::kHasCell ? c[i][e] : h[i][e];
        operands[i].at[0].set(e, A::operand(h[i][e]));
      }
      store(d.y + inputs[i].sequence_row * d.y_stride + unit, h[i]);
      inputs[i].step.save(shape, d, inputs[i].sequence_row, unit, blocks[i], c[i], h[i]);
      if (s == rows.length[i] - 1) {
        const int64_t at = (rows.first_b + i) * shape.hidden + unit;
        store(d.h_n + at, h[i]);
        if constexpr (C::kHasCell) store(d.c_n + at, c[i]);
      }
    }
  }
};

// Backward: one weight tile per unit group; the sum runs over the blocks of dz that depend on the state. One product
// more than steps, for the gradient of the initial state.
template <typename A, typename C>
struct BackwardJob {
  using Arithmetic = A;
  using S = typename A::Stored;
  using Call = RecurrenceBackward<S>;
  static constexpr Pass kPass = Pass::kBackward;
  static constexpr int kTiles = 1;
  static constexpr int kOperands = C::kGates;
  struct Operands {
    WordPack<typename A::Operand, kUnits> at[kOperands];
  };
  static constexpr bool kCarries = C::kCarries;
  static constexpr bool kBiasAhead = false;  // there is none
  static constexpr int kExtraSteps = 1;

  const RecurrenceShape& shape;
  const BackwardDirection<S>& d;
  int hidden;
  int unit;
  C cell;

  struct Inputs {
    int64_t sequence_row;
    WordPack<S, kUnits> grad_y;
    BackwardStep<C, S, kUnits> step;
  };
  struct Bias {};

  LLM_EXT_DEVICE BackwardJob(const Call& call, int first_unit)
      : shape(call.shape),
        d(call.direction[block_z()]),
        hidden(static_cast<int>(call.shape.hidden)),
        unit(first_unit),
        cell{call.shape.mode} {}

  LLM_EXT_DEVICE static int step_of(int i, int steps) { return steps - 1 - i; }
  LLM_EXT_DEVICE static int passes_before(int i, int steps, int tile_steps) { return i - (steps - tile_steps); }

  LLM_EXT_DEVICE float weight(int /*tile*/, int row_unit, int block, int column) const {
    if (row_unit >= hidden || column >= hidden) return 0.0f;
    return widen(d.w_hh[(block * shape.hidden + column) * shape.hidden + row_unit]);
  }

  LLM_EXT_DEVICE float first_operand(const Row&, int /*block*/, int /*column*/) const { return 0.0f; }

  LLM_EXT_DEVICE void clear(const Row& row, int from, int to) const {
#pragma unroll
    for (int b = 0; b < C::kBlocks; ++b) {
      const int64_t block = b * shape.hidden;
      clear_beyond(shape, row.b, row.length, d.dz, C::kBlocks * shape.hidden, block + from, block + to);
    }
  }

  LLM_EXT_DEVICE void start(const Row& row, float (&carried)[kUnits]) const {
#pragma unroll
    for (int e = 0; e < kUnits; ++e) carried[e] = 0.0f;
    if constexpr (C::kHasCell) {
      const auto given = load_or_zeros<kUnits>(d.grad_c_n, row.b * shape.hidden + unit);
#pragma unroll
      for (int e = 0; e < kUnits; ++e) carried[e] = given[e];
    }
  }

  LLM_EXT_DEVICE void load_bias(Bias&) const {}

  LLM_EXT_DEVICE void load_inputs(const Row& row, int s, Inputs& inputs) const {
    if (s < 0) return;
    inputs.sequence_row = sequence_row(shape, d.reverse, row.b, row.length, s);
    inputs.grad_y = load_or_zeros<kUnits>(d.grad_y, inputs.sequence_row * d.grad_y_stride + unit);
    inputs.step.load_at(shape, d, row.b, row.length, s, inputs.sequence_row, unit);
  }

  LLM_EXT_DEVICE void fetch_ahead(const Row& row, int s) const {
    if (s < kStepsAhead) return;
    const int64_t n = sequence_row(shape, d.reverse, row.b, row.length, s - kStepsAhead);
    if (d.grad_y != nullptr) prefetch(d.grad_y + n * d.grad_y_stride + unit);
    if constexpr (!C::kHasCell) prefetch(d.y + n * d.y_stride + unit);
#pragma unroll
    for (int k = 0; k < C::kSaved; ++k) prefetch(d.saved + (n * C::kSaved + k) * shape.hidden + unit);
  }

  LLM_EXT_DEVICE void run(const OwnRows& rows, int s, const Bias& bias, const Inputs (&inputs)[kOwnRows],
                          const Sums (&sums)[kTiles], Carried& carried, Operands (&operands)[kOwnRows]) const {
    float dh[kOwnRows][kUnits], carry[kOwnRows][kUnits], dz[kOwnRows][C::kBlocks][kUnits];
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
      for (int e = 0; e < kUnits; ++e) {
        dh[i][e] = sums[0][kOwnRows * e + i] + inputs[i].grad_y[e];
        carry[i][e] = carried.at[kUnits * i + e];
      }
      // grad_h_n is added at a row's last step; for a row of length 0 it becomes the gradient of the initial state.
      if (s == rows.length[i] - 1 && rows.length[i] >= 0 && d.grad_h_n != nullptr) {
        const auto given = load<kUnits>(d.grad_h_n + (rows.first_b + i) * shape.hidden + unit);
#pragma unroll
        for (int e = 0; e < kUnits; ++e) dh[i][e] += given[e];
      }
    }
    if (s < 0) {  // the product belongs to the initial state
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        if (rows.length[i] < 0) continue;
        const int64_t at = (rows.first_b + i) * shape.hidden + unit;
#pragma unroll
        for (int e = 0; e < kUnits; ++e) dh[i][e] += C::kCarries && !C::kHasCell ? carry[i][e] : 0.0f;
        if (d.dh0 != nullptr) store(d.dh0 + at, dh[i]);
        if constexpr (C::kHasCell) {
          if (d.dc0 != nullptr) store(d.dc0 + at, carry[i]);
        }
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) inputs[i].step.compute(cell, dh[i], carry[i], dz[i]);
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      if (s >= rows.length[i]) continue;
#pragma unroll
      for (int e = 0; e < kUnits; ++e) {
        carried.at[kUnits * i + e] = carry[i][e];
#pragma unroll
        for (int o = 0; o < kOperands; ++o) {
          operands[i].at[o].set(e, A::operand(dz[i][C::kBlocks - C::kGates + o][e]));
        }
      }
      inputs[i].step.write(shape, d, inputs[i].sequence_row, unit, dz[i]);
    }
  }
};

}  // namespace cuda
}  // namespace llm_ext
