// Arguments of additive attention. Letters and conventions: params/types.h. The formulas are in docs/math/attention.md.
#pragma once

#include <cstdint>

#include "params/types.h"

namespace llm_ext {

// Scores v . tanh(query + key), softmax over the keys, weighted mean of the values. The caller has projected queries
// and keys and added the bias to one of them.
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
  const int64_t* key_lengths;  // [B] keys k >= key_lengths[b] are masked, 0 <= key_lengths[b] <= Tk; null: all Tk
  const bool* mask;            // (b, q, k) at b * mask_batch_stride + q * mask_query_stride + k; false: key k is masked
                               // for query q; null: all true
  int64_t mask_batch_stride;   // elements
  int64_t mask_query_stride;   // elements; 0: one row for all queries of b
};

template <typename S>
struct AdditiveAttentionForwardParams {
  AdditiveAttentionInput<S> in;
  S* context;             // [B, Tq, Dv] out: 0 if every key is masked
  S* weights;             // [B, Tq, Tk] out: 0 for masked keys; null: not needed
  Compute<S>* workspace;  // forward_workspace() elements, aligned to 64 bytes, uninitialized
};

template <typename S>
struct AdditiveAttentionBackwardParams {
  AdditiveAttentionInput<S> in;
  const S* grad_context;  // [B, Tq, Dv]; null: zeros
  const S* grad_weights;  // [B, Tq, Tk]; null: zeros
  S* dquery;              // [B, Tq, A] out; null: not needed
  S* dkey;                // [B, Tk, A] out; null: not needed
  S* dv;                  // [A] out; null: not needed
  S* dvalues;             // [B, Tk, Dv] out; null: not needed
  Compute<S>* workspace;  // backward_workspace() elements, aligned to 64 bytes, uninitialized
};

}  // namespace llm_ext
