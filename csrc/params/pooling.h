// Arguments of attention pooling and of its causal prefix form. Letters and conventions: params/types.h. The formulas
// are in docs/math/attention.md.
#pragma once

#include <cstdint>

#include "params/types.h"

namespace llm_ext {

// The vectors e [B, T, D] to pool over T, and their scores. Arrays that grow with T are stored as S. Log-sum-exps,
// shares and the state of the prefix form accumulate over T and are stored as Compute<S>. A log-sum-exp that is read
// again is a LogSum.
template <typename S>
struct PoolInput {
  int64_t batch;           // B
  int64_t steps;           // T
  int64_t dim;             // D
  const S* e;              // element (b, t, d) at e[b * e_batch_stride + t * e_step_stride + d]
  int64_t e_batch_stride;  // elements
  int64_t e_step_stride;   // elements
  const S* u;              // [D] scores are e . u; null: use `scores`
  const S* scores;         // [B, T]; null: use `u`
  const int64_t* lengths;  // [B] positions t >= lengths[b] are masked, 0 <= lengths[b] <= T; null: all T
  const bool* mask;        // [B, T] false: the position is masked; null: all true
};

template <typename S>
struct PoolForwardParams {
  PoolInput<S> in;
  S* c;                   // [B, D] out: the pooled vector; 0 if every position is masked
  Compute<S>* lse;        // [B] out: log-sum-exp of the scores; -inf if every position is masked
  LogSum<Compute<S>>* l;  // [B] out: the same
  Compute<S>* workspace;  // workspace() elements, uninitialized
};

template <typename S>
struct PoolBackwardParams {
  PoolInput<S> in;
  const S* c;                   // [B, D] from the forward pass
  const LogSum<Compute<S>>* l;  // [B] from the forward pass
  const S* grad_c;              // [B, D]; null: zeros
  const Compute<S>* grad_lse;   // [B]; null: zeros
  S* de;                        // out, strides of e; null: not needed
  S* du;                        // [D] out; null: not needed, or `scores` given
  S* dscores;                   // [B, T] out; null: not needed, or `u` given
  Compute<S>* workspace;        // workspace() elements, uninitialized
};

// The causal prefix form: c_t pools over the positions i <= t and an initial state (l0, c0).
template <typename S>
struct PrefixPoolForwardParams {
  PoolInput<S> in;
  const LogSum<Compute<S>>* l0;  // [B] log-sum-exp of the initial state; null: without scores
  const Compute<S>* c0;          // [B, D] pooled vector of the initial state; null exactly if l0 is: zeros
  S* c;                          // out, strides of e
  Compute<S>* share;             // [B, T] out: a_t, the softmax weight of position t in c_t; 0 if masked
  LogSum<Compute<S>>* l_n;       // [B] out: log-sum-exp after the last step
  Compute<S>* c_n;               // [B, D] out: pooled vector after the last step
  Compute<S>* workspace;         // prefix_workspace() elements, uninitialized
};

// Does not read lengths, mask and scores: `share` implies them.
template <typename S>
struct PrefixPoolBackwardParams {
  PoolInput<S> in;
  const Compute<S>* c0;        // [B, D]; null: zeros
  const S* c;                  // strides of e, from the forward pass
  const Compute<S>* share;     // [B, T] from the forward pass
  const S* grad_c;             // strides of e; null: zeros
  const Compute<S>* grad_l_n;  // [B] of the log-sum-exp after the last step; null: zeros
  const Compute<S>* grad_c_n;  // [B, D]; null: zeros
  S* de;                       // out, strides of e; null: not needed
  S* du;                       // [D] out; null: not needed
  S* dscores;                  // [B, T] out; null: not needed
  Compute<S>* dl0;             // [B] out, of the log-sum-exp of the initial state; null: not needed
  Compute<S>* dc0;             // [B, D] out; null: not needed
  Compute<S>* workspace;       // prefix_workspace() elements, uninitialized
};

}  // namespace llm_ext
