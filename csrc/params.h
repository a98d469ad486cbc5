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

enum class Cell : int { kRnnTanh = 0, kRnnRelu = 1, kRnnSigmoid = 2, kGru = 3, kLstm = 4 };

// Gates: blocks of H rows in the weights, in the order of torch.nn (r z n; i f g o).
constexpr int gates_of(Cell cell) { return cell == Cell::kLstm ? 4 : (cell == Cell::kGru ? 3 : 1); }

// Blocks of H numbers a row whose gradients the backward pass computes. Those of the GRU are n r z m, n being the part
// of the new gate that comes from the input and m the part that comes from the state: the weights of the input see the
// first three, those of the state the last three.
constexpr int blocks_of(Cell cell) { return cell == Cell::kGru ? 4 : gates_of(cell); }

// Blocks of H numbers a row that the forward pass keeps for the backward pass: Elman none, GRU n r z m, LSTM i f g o c,
// and its output before the projection if there is one.
constexpr int kept_blocks(Cell cell, bool projected) {
  return cell == Cell::kLstm ? (projected ? 6 : 5) : (cell == Cell::kGru ? 4 : 0);
}

// One direction of one layer of a recurrence. docs/recurrence.md has the formulas.
struct RecurrenceSizes {
  Cell cell;
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
  S* kept;                // [N, kept_blocks H] out, for the backward pass; null: not wanted
  const void* packed;     // the weights as pack() leaves them; null where packed_size() is 0
  Compute<S>* workspace;  // forward_workspace() elements, aligned to 64 bytes; contents do not matter
  // Where all that x can be is known beforehand; then I is 0, and x, w_ih and b_ih are null:
  const S* table = nullptr;      // [V, G H] W_ih x + b_ih of each x that can be; null: none
  const int64_t* ids = nullptr;  // [N] which row of it stands for each x, 0 <= ids[n] < V; null exactly where table is
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
  const S* kept;          // [N, kept_blocks H] what the forward returned; null where that is 0
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

// An affine map of rows, y = x W^T + b.
struct LinearSizes {
  int64_t rows;    // N
  int64_t input;   // I
  int64_t output;  // O
};

template <typename S>
struct LinearForwardParams {
  LinearSizes sizes;
  const S* x;       // [N, I]
  const S* w;       // [O, I]
  const S* b;       // [O]; null: zeros
  const S* addend;  // [N, O]; null: zeros
  bool tanh;        // whether y is the tanh of the sum
  S* y;             // [N, O] out
  S* workspace;     // forward_workspace() elements, aligned to 64 bytes; contents do not matter
};

// The place of the largest result of each row; the results themselves are not stored.
template <typename S>
struct LinearArgmaxParams {
  LinearSizes sizes;  // 0 < O < 2^31
  const S* x;         // [N, I]
  const S* w;         // [O, I]
  const S* b;         // [O]; null: zeros
  int64_t* places;    // [N] out: of several that are equal the first; any NaN before all numbers
  S* workspace;       // argmax_workspace() elements, aligned to 64 bytes; contents do not matter
};

template <typename S>
struct LinearBackwardParams {
  LinearSizes sizes;
  const S* grad_y;  // [N, O]
  const S* x;       // [N, I]
  const S* w;       // [O, I]
  S* dx;            // [N, I] out; null: not wanted
  S* dw;            // [O, I] out; null: not wanted
  S* db;            // [O] out; null: not wanted
  S* workspace;     // backward_workspace() elements, aligned to 64 bytes; contents do not matter
};

// Vectors e [B, T, D] to pool over T, and where their scores come from. What grows with T is stored as S; log-sum-exps,
// shares and the state of the prefix form, which add up over it, are what S is computed in.
template <typename S>
struct PoolInput {
  int64_t batch;           // B
  int64_t steps;           // T
  int64_t dim;             // D
  const S* e;              // element (b, t, d) at e[b * e_batch_stride + t * e_step_stride + d]
  int64_t e_batch_stride;  // elements
  int64_t e_step_stride;   // elements
  const S* u;              // [D] scores are e . u; null: `scores` holds them
  const S* scores;         // [B, T]; null: `u` gives them
  const int64_t* lengths;  // [B] positions t >= lengths[b] take no part, 0 <= lengths[b] <= T; null: all T
  const bool* mask;        // [B, T] positions that are false take no part; null: all take part
};

template <typename S>
struct PoolForwardParams {
  PoolInput<S> in;
  S* c;                   // [B, D] out: the pooled vector; 0 where no position takes part
  Compute<S>* lse;        // [B] out: log of the sum of exp(score); -inf where no position takes part
  Compute<S>* workspace;  // workspace() elements; contents do not matter
};

template <typename S>
struct PoolBackwardParams {
  PoolInput<S> in;
  const S* c;                  // [B, D] what the forward returned
  const Compute<S>* lse;       // [B] what the forward returned
  const S* grad_c;             // [B, D]; null: zeros
  const Compute<S>* grad_lse;  // [B]; null: zeros
  S* de;                       // out, laid out as e; null: not wanted
  S* du;                       // [D] out; null: not wanted, or `scores` given
  S* dscores;                  // [B, T] out; null: not wanted, or `u` given
  Compute<S>* workspace;       // workspace() elements; contents do not matter
};

// The causal prefix form: c_t pools over the positions i <= t and an initial state.
template <typename S>
struct PrefixPoolForwardParams {
  PoolInput<S> in;
  const Compute<S>* l0;   // [B] log-sum-exp of what came before; null: -inf
  const Compute<S>* c0;   // [B, D] pooled vector of what came before; null exactly where l0 is: 0
  S* c;                   // out, laid out as e
  Compute<S>* share;      // [B, T] out: a_t, the share of each position in c_t; 0 where it takes no part
  Compute<S>* l_n;        // [B] out: the state after the last step
  Compute<S>* c_n;        // [B, D] out
  Compute<S>* workspace;  // prefix_workspace() elements; contents do not matter
};

// Lengths, mask and scores are not read: `share` knows all that follows from them.
template <typename S>
struct PrefixPoolBackwardParams {
  PoolInput<S> in;
  const Compute<S>* c0;        // [B, D]; null: zeros
  const S* c;                  // laid out as e: what the forward returned
  const Compute<S>* share;     // [B, T] what the forward returned
  const S* grad_c;             // laid out as e; null: zeros
  const Compute<S>* grad_l_n;  // [B]; null: zeros
  const Compute<S>* grad_c_n;  // [B, D]; null: zeros
  S* de;                       // out, laid out as e; null: not wanted
  S* du;                       // [D] out; null: not wanted
  S* dscores;                  // [B, T] out; null: not wanted
  Compute<S>* dl0;             // [B] out; null: not wanted
  Compute<S>* dc0;             // [B, D] out; null: not wanted
  Compute<S>* workspace;       // prefix_workspace() elements; contents do not matter
};

// Additive attention: scores v . tanh(query + key) of each pair, softmax over the keys, the weighted mean of the
// values. Queries and keys are projected already, with the bias in one of them.
template <typename S>
struct AdditiveAttentionInput {
  int64_t batch;               // B
  int64_t queries;             // Tq
  int64_t keys;                // Tk
  int64_t attn_dim;            // A
  int64_t value_dim;           // Dv
  const S* query;              // [B, Tq, A]
  const S* key;                // [B, Tk, A]
  const S* v;                  // [A]
  const S* values;             // [B, Tk, Dv]
  const int64_t* key_lengths;  // [B] keys k >= key_lengths[b] take no part, 0 <= key_lengths[b] <= Tk; null: all Tk
  const bool* mask;           // (b, q, k) at b * mask_batch_stride + q * mask_query_stride + k; a key takes no part for
                              // a query where it is false; null: all do
  int64_t mask_batch_stride;  // elements
  int64_t mask_query_stride;  // elements; 0: one row for all queries of b
};

template <typename S>
struct AdditiveAttentionForwardParams {
  AdditiveAttentionInput<S> in;
  S* context;             // [B, Tq, Dv] out: 0 where no key takes part
  Compute<S>* lse;        // [B, Tq] out: log of the sum of exp(score); -inf where no key takes part
  S* weights;             // [B, Tq, Tk] out: 0 where a key takes no part; null: not wanted
  Compute<S>* workspace;  // forward_workspace() elements, aligned to 64 bytes; contents do not matter
};

template <typename S>
struct AdditiveAttentionBackwardParams {
  AdditiveAttentionInput<S> in;
  const S* context;       // [B, Tq, Dv] what the forward returned
  const Compute<S>* lse;  // [B, Tq] what the forward returned
  const S* weights;       // [B, Tq, Tk] what the forward returned; null exactly where grad_weights is
  const S* grad_context;  // [B, Tq, Dv]; null: zeros
  const S* grad_weights;  // [B, Tq, Tk]; null: zeros
  S* dquery;              // [B, Tq, A] out; null: not wanted
  S* dkey;                // [B, Tk, A] out; null: not wanted
  S* dv;                  // [A] out; null: not wanted
  S* dvalues;             // [B, Tk, Dv] out; null: not wanted
  Compute<S>* workspace;  // backward_workspace() elements, aligned to 64 bytes; contents do not matter
};

}  // namespace llm_ext
