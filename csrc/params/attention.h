// Arguments of one call of additive attention. The letters and conventions are those of params/types.h.
#pragma once

#include <cstdint>

#include "params/types.h"

namespace llm_ext {

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
