// Arguments of one call of attention pooling. The letters and conventions are those of params/types.h.
#pragma once

#include <cstdint>

#include "params/types.h"

namespace llm_ext {

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

}  // namespace llm_ext
