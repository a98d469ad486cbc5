// One forward pass of one layer, from filled params to finished results: workspace, packed weights, team.
#pragma once

#include <cstring>

#include "cpu/kernels.h"
#include "params/attention.h"
#include "params/linear.h"
#include "params/pooling.h"
#include "params/rnn.h"
#include "torch/tensor_args.h"
#include "torch/weight_cache/packed_weight_cache.h"

namespace llm_ext {

template <typename T>
constexpr int64_t kBytes = sizeof(T);

// The packed weights of a call: found, or to be packed by the team of the call. Sets `packed` of the params, which must
// outlive it.
template <typename S>
class PackedFor {
 public:
  PackedFor(RecurrenceForwardParams<S>& p, int threads)
      : p_(p), threads_(threads), bytes_(kernel().packed_size(p.sizes)) {
    if (bytes_ == 0) return;
    hash_ = current_hash();
    packed_ = packed_weights().find(hash_);
    fresh_ = !packed_.has_value();
    if (fresh_) packed_ = empty({bytes_}, ScalarType::Byte);
    p_.packed = data<uint8_t>(*packed_);
  }

  // By all threads of the team; they have met afterwards.
  void pack(const ThreadTeam& team) const {
    if (!fresh_) return;
    kernel().pack(p_, mutable_data<uint8_t>(*packed_), team);
    team.sync();
  }

  // After the call.
  void remember() const {
    if (fresh_ && packed_weights().expects(hash_, bytes_) && current_hash() == hash_) {
      packed_weights().remember(hash_, *packed_, bytes_);
    }
  }

 private:
  static const RecurrenceKernels<S>& kernel() { return kernels().recurrence<S>(); }

  Hash128 current_hash() const {
    const RecurrenceSizes& s = p_.sizes;
    const int64_t gates = gates_of(s.mode) * s.hidden;
    return hash_of({{p_.w_ih, gates * s.input * kBytes<S>},
                      {p_.w_hh, gates * s.output * kBytes<S>},
                      {p_.w_hr, s.projected() ? s.output * s.hidden * kBytes<S> : 0}},
                     {static_cast<int64_t>(s.mode), static_cast<int64_t>(kScalarType<S>), s.input, s.hidden, s.output},
                     threads_);
  }

  RecurrenceForwardParams<S>& p_;
  const int threads_;
  const int64_t bytes_;
  bool fresh_ = false;
  Hash128 hash_{};
  OptionalTensor packed_;
};

// The state of a sequence of no steps is what it started from; likewise its gradient.
template <typename S>
void pass_state(int64_t elements, const S* from, S* to) {
  if (to == nullptr) return;
  if (from != nullptr) {
    std::memcpy(to, from, elements * sizeof(S));
  } else {
    std::memset(to, 0, elements * sizeof(S));
  }
}

// `packed` and `workspace` of the params are filled in here. A sequence has at least one step.
template <typename S>
void launch_forward(RecurrenceForwardParams<S>& p) {
  const RecurrenceKernels<S>& kernel = kernels().recurrence<S>();
  const int threads = team_size(kernel.threads(p.sizes, max_threads()));
  const OptionalTensor workspace = workspace_of<S>(kernel.forward_workspace(p.sizes, threads));
  p.workspace = workspace ? mutable_data<Compute<S>>(*workspace) : nullptr;
  const PackedFor<S> weights(p, threads);
  run_team(threads, [&](const ThreadTeam& team) {
    weights.pack(team);
    kernel.forward(p, team);
  });
  weights.remember();
}

}  // namespace llm_ext
