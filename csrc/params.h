// What one call of each op is: sizes, pointers, options. Plain C++; every room reads it.
//
// Letters: T time, B batch, I input size, H hidden size, D embedding size. N is the number of rows of a sequence laid
// out one step after the other: T * B, or fewer where packed sequences end early. All arrays are dense and row-major
// unless a stride is named; no two may overlap unless the line says so; null only where the line says so.
#pragma once

#include <cstdint>

namespace llm_ext {

enum class Nonlinearity : int { kTanh = 0, kRelu = 1, kSigmoid = 2 };

// One direction of one layer of a recurrence: h_t = f(w_ih x_t + b_ih + w_hh h_{t-1} + b_hh).
template <typename T>
struct RecurrenceSizes {
  int64_t steps;               // T
  int64_t batch;               // B: rows of the longest step
  int64_t input;               // I
  int64_t hidden;              // H
  const int64_t* row_offsets;  // [T + 1] first row of each step; step t has row_offsets[t + 1] - row_offsets[t] rows
  Nonlinearity nonlinearity;
  bool reverse;  // run from the last step to the first
};

template <typename T>
struct RnnForwardParams {
  RecurrenceSizes<T> sizes;
  const T* x;     // [N, I]
  const T* h0;    // [B, H] initial state; null: zeros
  const T* w_ih;  // [H, I]
  const T* w_hh;  // [H, H]
  const T* b_ih;  // [H]; null: zeros
  const T* b_hh;  // [H]; null: zeros
  T* y;           // [N, H] out: every hidden state
  T* h_n;         // [B, H] out: the state after each row's last step
  T* workspace;   // rnn_forward_workspace() elements, aligned to 64 bytes; contents do not matter
};

template <typename T>
struct RnnBackwardParams {
  RecurrenceSizes<T> sizes;
  const T* grad_y;    // [N, H]; null: zeros
  const T* grad_h_n;  // [B, H]; null: zeros
  const T* x;         // [N, I]
  const T* h0;        // [B, H]; null: zeros
  const T* w_ih;      // [H, I]
  const T* w_hh;      // [H, H]
  const T* y;         // [N, H] what the forward returned
  T* dz;              // [N, H] out: gradient of the pre-activations
  T* dx;              // [N, I] out; null: not wanted
  T* dh0;             // [B, H] out; null: not wanted
  T* dw_ih;           // [H, I] out; null: not wanted
  T* dw_hh;           // [H, H] out; null: not wanted
  T* db;              // [H] out: gradient of either bias; null: not wanted
  T* workspace;       // rnn_backward_workspace() elements, aligned to 64 bytes; contents do not matter
};

// Vectors e [B, T, D] to pool over T, and where their scores come from.
template <typename T>
struct PoolInput {
  int64_t batch;           // B
  int64_t steps;           // T
  int64_t dim;             // D
  const T* e;              // element (b, t, d) at e[b * e_batch_stride + t * e_step_stride + d]
  int64_t e_batch_stride;  // elements
  int64_t e_step_stride;   // elements
  const T* u;              // [D] scores are e . u; null: `scores` holds them
  const T* scores;         // [B, T]; null: `u` gives them
  const int64_t* lengths;  // [B] positions t >= lengths[b] take no part, 0 <= lengths[b] <= T; null: all T
  const bool* mask;        // [B, T] positions that are false take no part; null: all take part
};

template <typename T>
struct PoolForwardParams {
  PoolInput<T> in;
  T* c;          // [B, D] out: the pooled vector; 0 where no position takes part
  T* lse;        // [B] out: log of the sum of exp(score); -inf where no position takes part
  T* workspace;  // pool_workspace() elements; contents do not matter
};

template <typename T>
struct PoolBackwardParams {
  PoolInput<T> in;
  const T* c;         // [B, D] what the forward returned
  const T* lse;       // [B] what the forward returned
  const T* grad_c;    // [B, D]; null: zeros
  const T* grad_lse;  // [B]; null: zeros
  T* de;              // out, laid out as e; null: not wanted
  T* du;              // [D] out; null: not wanted, or `scores` given
  T* dscores;         // [B, T] out; null: not wanted, or `u` given
  T* workspace;       // pool_workspace() elements; contents do not matter
};

// The causal prefix form: c_t pools over the positions i <= t and an initial state.
template <typename T>
struct PrefixPoolForwardParams {
  PoolInput<T> in;
  const T* l0;   // [B] log-sum-exp of what came before; null: -inf
  const T* c0;   // [B, D] pooled vector of what came before; null exactly where l0 is: 0
  T* c;          // out, laid out as e
  T* share;      // [B, T] out: a_t, the share of each position in c_t; 0 where it takes no part
  T* l_n;        // [B] out: the state after the last step
  T* c_n;        // [B, D] out
  T* workspace;  // prefix_pool_workspace() elements; contents do not matter
};

// Lengths, mask and scores are not read: `share` knows all that follows from them.
template <typename T>
struct PrefixPoolBackwardParams {
  PoolInput<T> in;
  const T* c0;        // [B, D]; null: zeros
  const T* c;         // laid out as e: what the forward returned
  const T* share;     // [B, T] what the forward returned
  const T* grad_c;    // laid out as e; null: zeros
  const T* grad_l_n;  // [B]; null: zeros
  const T* grad_c_n;  // [B, D]; null: zeros
  T* de;              // out, laid out as e; null: not wanted
  T* du;              // [D] out; null: not wanted
  T* dscores;         // [B, T] out; null: not wanted
  T* dl0;             // [B] out; null: not wanted
  T* dc0;             // [B, D] out; null: not wanted
  T* workspace;       // prefix_pool_workspace() elements; contents do not matter
};

}  // namespace llm_ext
