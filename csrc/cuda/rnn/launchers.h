// The contracts of the recurrence's launchers on NVIDIA GPUs. Plain C++: no CUDA header is needed.
//
// A call runs one layer, one or both directions, in one launch. The caller computes the products over the whole
// sequence: gates_x = x W_ih^T + b_ih before the forward pass, and the gradients of weights, biases and x from dz after
// the backward pass. Launchers queue work on a stream and never wait. They return a cudaError_t (0: queued) and clear
// CUDA's last error.
//
// Pointers are to memory of the current device. The workspace is aligned to 256 bytes and tensors to 16. Exception: y,
// grad_y, their strides and the tensors of the second direction are aligned to two elements if H is even, to one if it
// is odd. Outputs overlap nothing else. Letters are those of params/types.h. The N rows of a sequence are adjacent: row
// t B + b for padded sequences, row_offsets[t] + b for packed ones.
#pragma once

#include <cstdint>

#include "cuda/rnn/plan.h"
#include "params/rnn.h"

namespace llm_ext {
namespace cuda {

constexpr int kMaxDirections = 2;

struct RecurrenceShape {
  Mode mode;
  int64_t steps;               // T, at least 1, below 2^31
  int64_t batch;               // B, at least 1; packed: the rows of the first step
  int64_t hidden;              // H, at least 1
  int64_t output;              // P; smaller than H where an LSTM projects
  int directions;              // 1 or 2
  const int64_t* lengths;      // [B] steps of each row, 0 to T, in any order, on the device; null: T, or packed
  const int64_t* row_offsets;  // [T + 1] packed: first row of each step, on the device; null: not packed
};

template <typename S>
struct ForwardDirection {
  bool reverse;      // from each row's last step to its first
  const S* gates_x;  // [N, G H] x W_ih^T + b_ih, gates in the order of the weights; not read beyond a row's length
  const S* w_hh;     // [G H, P]
  const S* w_hr;     // [P, H] LSTM: the projection; null exactly where P = H
  const S* b_hh;     // [G H] added to the product of the state; null: zeros, or (Elman, LSTM) already in gates_x
  const S* h0;       // [B, P]; null: zeros
  const S* c0;       // [B, H] LSTM; null: zeros
  S* y;              // [N, P] out, rows y_stride apart: every state; 0 beyond a row's length
  int64_t y_stride;  // elements, at least P: both directions may share one y
  S* h_n;            // [B, P] out: the state after each row's last step
  S* c_n;            // [B, H] LSTM, out; null for others
  S* saved;          // [N, saved_blocks H] out: saved activations, undefined beyond a row's length; null: not wanted
};

template <typename S>
struct RecurrenceForward {
  RecurrenceShape shape;
  ForwardDirection<S> direction[kMaxDirections];
  void* workspace;  // workspace_bytes(); contents do not matter; null if that is 0
};

template <typename S>
struct BackwardDirection {
  bool reverse;           // as in the forward pass
  const S* grad_y;        // [N, P], rows grad_y_stride apart, not read beyond a row's length; null: zeros
  int64_t grad_y_stride;  // elements
  const S* grad_h_n;      // [B, P]; null: zeros
  const S* grad_c_n;      // [B, H] LSTM; null: zeros
  const S* w_hh;          // [G H, P]
  const S* w_hr;          // [P, H]; null exactly where P = H
  const S* h0;            // [B, P]; null: zeros
  const S* c0;            // [B, H] LSTM; null: zeros
  const S* y;             // [N, P], rows y_stride apart: what the forward returned
  int64_t y_stride;       // elements
  const S* saved;         // [N, saved_blocks H] what the forward returned; null if saved_blocks is 0
  S* dz;   // [N, blocks_of(mode) H] out: gradients of the pre-activations, blocks in the order of params/rnn.h (GRU n r
           // z m, LSTM i f g o); 0 beyond a row's length
  S* dh;   // [N, P] out: gradients of all states, for the gradient of w_hr; 0 beyond a row's length; null exactly where
           // P = H
  S* dh0;  // [B, P] out; null: not wanted
  S* dc0;  // [B, H] LSTM, out; null: not wanted
};

template <typename S>
struct RecurrenceBackward {
  RecurrenceShape shape;
  BackwardDirection<S> direction[kMaxDirections];
  void* workspace;  // workspace_bytes(); contents do not matter; null if that is 0
};

// Both exist for S = float, double, BFloat16, Float16. `plan` is make_plan() of the same shape, pass and type; it says
// whether TF32 is allowed. T, B and H are not 0: the caller handles empty sequences.
template <typename S>
int recurrence_forward(const RecurrenceForward<S>& params, const Plan& plan, void* stream);
template <typename S>
int recurrence_backward(const RecurrenceBackward<S>& params, const Plan& plan, void* stream);

}  // namespace cuda
}  // namespace llm_ext
