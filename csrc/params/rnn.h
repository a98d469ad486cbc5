// Arguments of one call of a recurrence. The letters and conventions are those of params/types.h.
#pragma once

#include <cstdint>

#include "params/types.h"

namespace llm_ext {

enum class Mode : int { kRnnTanh = 0, kRnnRelu = 1, kRnnSigmoid = 2, kGru = 3, kLstm = 4 };

// Gates: blocks of H rows in the weights, in the order of torch.nn (r z n; i f g o).
constexpr int gates_of(Mode mode) { return mode == Mode::kLstm ? 4 : (mode == Mode::kGru ? 3 : 1); }

// Blocks of H numbers a row whose gradients the backward pass computes. Those of the GRU are n r z m, n being the part
// of the new gate that comes from the input and m the part that comes from the state: the weights of the input see the
// first three, those of the state the last three.
constexpr int blocks_of(Mode mode) { return mode == Mode::kGru ? 4 : gates_of(mode); }

// Blocks of H numbers a row that the forward pass keeps for the backward pass: Elman none, GRU n r z m, LSTM i f g o c,
// and its output before the projection if there is one.
constexpr int saved_blocks(Mode mode, bool projected) {
  return mode == Mode::kLstm ? (projected ? 6 : 5) : (mode == Mode::kGru ? 4 : 0);
}

// One direction of one layer of a recurrence. docs/recurrence.md has the formulas.
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
  const S* x;             // [N, I]
  const S* h0;            // [B, P] initial state; null: zeros
  const S* c0;            // [B, H] LSTM: initial cell state; null: zeros
  const S* w_ih;          // [G H, I]
  const S* w_hh;          // [G H, P]
  const S* b_ih;          // [G H]; null: zeros
  const S* b_hh;          // [G H]; null: zeros
  const S* w_hr;          // [P, H] LSTM: the projection; null exactly where P = H
  S* y;                   // [N, P] out: every state
  S* h_n;                 // [B, P] out: the state after each row's last step
  S* c_n;                 // [B, H] LSTM, out: the cell state after each row's last step; may be c0
  S* saved;                // [N, saved_blocks H] out, for the backward pass; null: not wanted
  const void* packed;     // the weights as pack() leaves them; null where packed_size() is 0
  Compute<S>* workspace;  // forward_workspace() elements, aligned to 64 bytes; contents do not matter
  // Where all that x can be is known beforehand; then I is 0, and x, w_ih and b_ih are null:
  const S* input_projections = nullptr;      // [V, G H] W_ih x + b_ih of each x that can be; null: none
  const int64_t* input_ids = nullptr;  // [N] which row of it stands for each x, 0 <= ids[n] < V; null exactly where table is
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
  const S* w_hr;          // [P, H]; null exactly where P = H
  const S* y;             // [N, P] what the forward returned
  const S* saved;          // [N, saved_blocks H] what the forward returned; null where that is 0
  S* dx;                  // [N, I] out; null: not wanted
  S* dh0;                 // [B, P] out; null: not wanted
  S* dc0;                 // [B, H] LSTM, out; null: not wanted
  S* dw_ih;               // [G H, I] out; null: not wanted
  S* dw_hh;               // [G H, P] out; null: not wanted
  S* dw_hr;               // [P, H] out; null: not wanted
  S* db_ih;               // [G H] out; null: not wanted
  S* db_hh;               // [G H] out; null: not wanted
  Compute<S>* workspace;  // backward_workspace() elements, aligned to 64 bytes; contents do not matter
};

}  // namespace llm_ext
