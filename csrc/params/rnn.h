// Arguments of one direction of one recurrent layer. Letters and conventions: params/types.h. The formulas are in
// docs/math/recurrence.md.
#pragma once

#include <cstdint>

#include "params/types.h"

namespace llm_ext {

// torch.nn.RNNBase.mode, with a sigmoid besides.
enum class Mode : int { kRnnTanh = 0, kRnnRelu = 1, kRnnSigmoid = 2, kGru = 3, kLstm = 4 };

// Gates: blocks of H rows in the weights, in the order of torch.nn (r z n; i f g o).
constexpr int gates_of(Mode mode) { return mode == Mode::kLstm ? 4 : (mode == Mode::kGru ? 3 : 1); }

// Blocks of H pre-activations in a row of dz. The GRU has n r z m, where n is the input's term of the new gate and m
// the state's: W_ih multiplies the first three, W_hh the last three.
constexpr int blocks_of(Mode mode) { return mode == Mode::kGru ? 4 : gates_of(mode); }

// Blocks of H numbers in a row of the saved activations: none for Elman, n r z m for the GRU, i f g o c for the LSTM,
// and the output before the projection if there is one.
constexpr int saved_blocks(Mode mode, bool projected) {
  return mode == Mode::kLstm ? (projected ? 6 : 5) : (mode == Mode::kGru ? 4 : 0);
}

struct RecurrenceSizes {
  Mode mode;
  int64_t steps;               // T
  int64_t batch;               // B: rows of the longest step
  int64_t input;               // I
  int64_t hidden;              // H
  int64_t output;              // P
  const int64_t* row_offsets;  // [T + 1] first row of each step; step t has row_offsets[t + 1] - row_offsets[t] rows
  bool reverse;                // run from the last step to the first

  bool projected() const { return output != hidden; }
};

template <typename S>
struct RecurrenceForwardParams {
  RecurrenceSizes sizes;
  const S* x;             // [N, I]; null with input_projections
  const S* h0;            // [B, P] initial state; null: zeros
  const S* c0;            // [B, H] LSTM: initial cell state; null: zeros
  const S* w_ih;          // [G H, I]; null with input_projections
  const S* w_hh;          // [G H, P]
  const S* b_ih;          // [G H]; null: zeros
  const S* b_hh;          // [G H]; null: zeros
  const S* w_hr;          // [P, H] LSTM: the projection; null exactly if P = H
  S* y;                   // [N, P] out: every state
  S* h_n;                 // [B, P] out: the state after each row's last step
  S* c_n;                 // [B, H] LSTM, out: the cell state after each row's last step; may be c0
  S* saved;               // [N, saved_blocks H] out: saved activations for the backward pass; null: not needed
  const void* packed;     // the packed weights, as pack() writes them; null if packed_size() is 0
  Compute<S>* workspace;  // forward_workspace() elements, aligned to 64 bytes, uninitialized
  // If the inputs are ids of precomputed input projections; then I is 0, and x, w_ih and b_ih are null.
  const S* input_projections = nullptr;  // [V, G H] W_ih x + b_ih of each id; null: x is the input
  const int64_t* input_ids = nullptr;    // [N] 0 <= input_ids[n] < V; null exactly if input_projections is
};

template <typename S>
struct RecurrenceBackwardParams {
  RecurrenceSizes sizes;
  const S* grad_y;        // [N, P]; null: zeros
  const S* grad_h_n;      // [B, P]; null: zeros
  const S* grad_c_n;      // [B, H] LSTM; null: zeros
  const S* x;             // [N, I]
  const S* h0;            // [B, P]; null: zeros
  const S* c0;            // [B, H] LSTM; null: zeros
  const S* w_ih;          // [G H, I]
  const S* w_hh;          // [G H, P]
  const S* w_hr;          // [P, H]; null exactly if P = H
  const S* y;             // [N, P] from the forward pass
  const S* saved;         // [N, saved_blocks H] from the forward pass; null if saved_blocks is 0
  S* dx;                  // [N, I] out; null: not needed
  S* dh0;                 // [B, P] out; null: not needed
  S* dc0;                 // [B, H] LSTM, out; null: not needed
  S* dw_ih;               // [G H, I] out; null: not needed
  S* dw_hh;               // [G H, P] out; null: not needed
  S* dw_hr;               // [P, H] out; null: not needed
  S* db_ih;               // [G H] out; null: not needed
  S* db_hh;               // [G H] out; null: not needed
  Compute<S>* workspace;  // backward_workspace() elements, aligned to 64 bytes, uninitialized
};

// The linear system that the tangents (a, h, c) of a recurrence solve: a of the pre-activations, h of the states, c of
// the cell states. docs/math/derivatives.md.
template <typename S>
struct LinearizedRecurrence {
  RecurrenceSizes sizes;  // input is 0
  const S* h0;            // [B, P] initial state of the recurrence; never null
  const S* c0;            // [B, H] LSTM: initial cell state; never null there
  const S* w_hh;          // [G H, P]
  const S* w_hr;          // [P, H]; null exactly if P = H
  const S* y;             // [N, P] from the forward pass
  const S* saved;         // [N, saved_blocks H] from the forward pass; null if saved_blocks is 0
};

// Solves the system forwards in time for its right side (v_a, v_h, v_c).
template <typename S>
struct RecurrenceTangentParams {
  LinearizedRecurrence<S> at;
  const S* v_a;  // [N, blocks H]; null: zeros
  const S* v_h;  // [N, P]; null: zeros
  const S* v_c;  // [N, H] LSTM; null: zeros
  const S* h0;   // [B, P] tangents of the initial state; null: zeros
  const S* c0;   // [B, H] LSTM, likewise
  S* a;          // [N, blocks H] out
  S* h;          // [N, P] out
  S* c;          // [N, H] LSTM, out
  S* workspace;  // tangent_workspace() elements, aligned to 64 bytes, uninitialized
};

// Solves the transposed system backwards in time for its right side (g_a, g_h, g_c), to which gradients of the saved
// activations are added.
template <typename S>
struct RecurrenceAdjointParams {
  LinearizedRecurrence<S> at;
  const S* g_a;      // [N, blocks H]; null: zeros
  const S* g_h;      // [N, P]; null: zeros
  const S* g_c;      // [N, H] LSTM; null: zeros
  const S* g_saved;  // [N, saved_blocks H]; null: zeros
  S* a;              // [N, blocks H] out
  S* h;              // [N, P] out
  S* c;              // [N, H] LSTM, out
  S* dh0;            // [B, P] out: gradient of the initial state
  S* dc0;            // [B, H] LSTM, out
  S* workspace;      // adjoint_workspace() elements, aligned to 64 bytes, uninitialized
};

// The gradient of <adjoint, tangents> by the activations, where the tangents solve the system. "State" is h, and c in
// an LSTM. Pointers that belong to other cells are null.
template <typename S>
struct RecurrenceCurvatureParams {
  LinearizedRecurrence<S> at;  // w_hh and w_hr are not read
  const S* a;                  // [N, blocks H] tangents of the pre-activations
  const S* state;              // [N, H] tangents of the state; GRU and LSTM
  const S* state0;             // [B, H] tangents of the initial state; null: zeros
  const S* adjoint_h;          // [N, H] adjoints of h before a projection
  const S* adjoint_c;          // [N, H] adjoints of c; LSTM
  S* d_saved;                  // [N, saved_blocks H] out; GRU and LSTM
  S* d_y;                      // [N, P] out; not LSTM
  S* d_state0;                 // [B, H] out; GRU and LSTM
};

}  // namespace llm_ext
