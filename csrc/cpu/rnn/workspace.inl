// Memory of a recurrence besides its results: packed weights and the workspaces of both passes.
#pragma once

#include "cpu/gemm/blocking.inl"
#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"
#include "cpu/rnn/steps.inl"
#include "cpu/simd/float16.inl"
#include "cpu/simd/traits.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Sequences of at most this many rows use unpacked weights, and with AVX-512 also four times as many in one or two
// steps. At 64 rows in one step both paths are equally fast with cached packed weights, Zen 5; on a Zen 3 the packed
// path is faster: docs/lab/cpu-constants.md.
constexpr int64_t kUnpackedRows = 16;
constexpr int64_t kUnpackedRowsOfShort = LLM_EXT_VECTOR_BYTES == 64 ? 4 * kUnpackedRows : kUnpackedRows;

// Block size for pre-activations, which are computed ahead of the loop over their steps: bytes, and at least
// kStepBlockRows rows. Not tuned.
constexpr int64_t kStepBlockBytes = 2 << 20;
constexpr int64_t kStepBlockRows = 192;

static inline bool runs_unpacked(const RecurrenceSizes& s) {
  return !s.projected() && total_rows(s) <= (s.steps <= 2 ? kUnpackedRowsOfShort : kUnpackedRows);
}

// The row limit of a block of steps. A block has at least one step.
template <typename T>
static inline int64_t step_block_rows(const RecurrenceSizes& s) {
  const int64_t rows = kStepBlockBytes / static_cast<int64_t>(sizeof(T)) / (gates_of(s.mode) * s.hidden + 1);
  const int64_t fitting = rows > kStepBlockRows ? rows : kStepBlockRows;
  return fitting > s.batch ? fitting : s.batch;
}

// The most rows of any block of steps of this sequence.
template <typename T>
static inline int64_t max_step_block_rows(const RecurrenceSizes& s) {
  return step_block_rows<T>(s) < total_rows(s) ? step_block_rows<T>(s) : total_rows(s);
}

// Elements of T for an array of n elements of F.
template <typename T, typename F>
static inline int64_t elements_for(int64_t n) {
  return aligned(divide_up(n * static_cast<int64_t>(sizeof(F)), sizeof(T)));
}

// Sizes of the packed weights of a forward pass, in this order in memory, in elements of R.
template <typename R>
struct PackedWeights {
  explicit PackedWeights(const RecurrenceSizes& s)
      : ih(aligned(packed_size<R>(gates_of(s.mode) * s.hidden, s.input))),
        hh_gate(aligned(packed_size<R>(s.hidden, s.output))),
        hr(s.projected() ? aligned(packed_size<R>(s.output, s.hidden)) : 0),
        total(ih + gates_of(s.mode) * hh_gate + hr) {}

  int64_t ih;       // W_ih
  int64_t hh_gate;  // W_hh, per gate
  int64_t hr;       // W_hr
  int64_t total;
};

template <typename S>
static int64_t packed_weights_size(const RecurrenceSizes& s) {
  return runs_unpacked(s) ? 0 : PackedWeights<S>(s).total * sizeof(S);
}

// Sizes of the arrays in the workspace of a forward pass, in this order in memory, in elements of T.
template <typename S, typename T = Compute<S>>
struct ForwardWorkspace {
  ForwardWorkspace(const RecurrenceSizes& s, int threads)
      : bias(aligned(gates_of(s.mode) * s.hidden)),
        z(gates_of(s.mode) > 1 || kIsNarrow<S> ? aligned(max_step_block_rows<T>(s) * gates_of(s.mode) * s.hidden) : 0),
        m(s.projected() ? elements_for<T, Factor<S>>(s.batch * s.hidden) : 0),
        states(kIsNarrow<S> ? aligned(2 * s.batch * s.output) : 0),
        cells(kIsNarrow<S> && s.mode == Mode::kLstm ? aligned(s.batch * s.hidden) : 0),
        left(kSame<Factor<S>, S> ? 0 : aligned(mc_rows<T>(s.input) * s.input)),
        total(bias + z + m + states + cells + threads * left) {}

  int64_t bias;    // biases of the input's blocks
  int64_t z;       // pre-activations of a block of steps, unless they are stored in a result
  int64_t m;       // output of a step before the projection
  int64_t states;  // states of two steps, unless y stores them as T
  int64_t cells;   // cell states, unless c_n stores them as T
  int64_t left;    // per thread: an MC block of x, unless x is stored as Factor<S>
  int64_t total;
};

template <typename S>
static int64_t recurrence_forward_workspace(const RecurrenceSizes& s, int threads) {
  const ForwardWorkspace<S> sizes(s, threads);
  return runs_unpacked(s) ? sizes.states + sizes.cells : sizes.total;
}

// Sizes of the arrays in the workspace of a backward pass, in this order in memory, in elements of T.
template <typename S, typename T = Compute<S>>
struct BackwardWorkspace {
  BackwardWorkspace(const RecurrenceSizes& s, int threads)
      : hh(elements_for<T, S>(packed_size<S>(s.output, gates_of(s.mode) * s.hidden))),
        hr(s.projected() ? elements_for<T, S>(packed_size<S>(s.hidden, s.output)) : 0),
        ih(elements_for<T, S>(packed_size<S>(s.input, gates_of(s.mode) * s.hidden))),
        carry(gates_of(s.mode) > 1 ? aligned(s.batch * s.hidden) : 0),
        dh(s.projected() ? elements_for<T, Factor<S>>(max_block_rows(s) * s.output) : 0),
        dz(elements_for<T, Factor<S>>(max_block_rows(s) * blocks_of(s.mode) * s.hidden)),
        sums(kIsNarrow<S> ? aligned(gradients(s)) : 0),
        block(elements_for<T, Factor<S>>(kGradientWorkspace<T>)),
        total(hh + hr + ih + carry + dh + 2 * dz + sums + threads * block) {}

  // The most rows of a block of steps: KC of the weight gradients, or one step.
  static int64_t max_block_rows(const RecurrenceSizes& s) {
    const int64_t rows = total_rows(s) < kGradientKC<T> ? total_rows(s) : kGradientKC<T>;
    return rows > s.batch ? rows : s.batch;
  }
  static int64_t gradients(const RecurrenceSizes& s) {
    return gates_of(s.mode) * s.hidden * (s.input + s.output + 2) + (s.projected() ? s.output * s.hidden : 0);
  }

  int64_t hh;     // packed W_hh
  int64_t hr;     // packed W_hr
  int64_t ih;     // packed W_ih
  int64_t carry;  // the gradient that passes from step to step besides the product
  int64_t dh;     // gradients of the states of a block of steps, if they are projected
  int64_t dz;     // gradients of the pre-activations of a block of steps; there are two
  int64_t sums;   // gradients of weights and biases, unless the results are stored as T
  int64_t block;  // per thread: packed blocks of the weight gradients
  int64_t total;
};

template <typename S>
static int64_t recurrence_backward_workspace(const RecurrenceSizes& s, int threads) {
  return BackwardWorkspace<S>(s, threads).total;
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
