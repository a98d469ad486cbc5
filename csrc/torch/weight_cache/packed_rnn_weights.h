// CPU only: the packed weights of one recurrence, for one call.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "params/rnn.h"
#include "torch/alloc/empty.h"
#include "torch/dtypes.h"
#include "torch/tensor.h"
#include "torch/weight_cache/packed_weight_cache.h"

namespace llm_ext {

// Takes the packed weights from the cache, or allocates them for pack(). Sets `packed` of the params, which must
// outlive this object. Does nothing for sizes whose kernels read the weights unpacked.
template <typename S>
class PackedRnnWeights {
 public:
  PackedRnnWeights(RecurrenceForwardParams<S>& p, int threads)
      : p_(p), threads_(threads), bytes_(kernels().recurrence<S>().packed_size(p.sizes)) {
    if (bytes_ == 0) return;
    hash_ = current_hash();
    packed_ = packed_weight_cache().find(hash_);
    missed_ = !packed_.has_value();
    if (missed_) packed_ = empty({bytes_}, ScalarType::Byte);
    p_.packed = data<uint8_t>(*packed_);
  }

  // Packs the weights if they were not cached. All threads of the team call it, and it ends with a barrier.
  void pack(const ThreadTeam& team) const {
    if (!missed_) return;
    kernels().recurrence<S>().pack(p_, mutable_data<uint8_t>(*packed_), team);
    team.sync();
  }

  // Inserts newly packed weights into the cache, if that pays. Call it once, after the team has finished.
  void insert_into_cache() const {
    if (missed_ && packed_weight_cache().record_miss(hash_, bytes_) && current_hash() == hash_) {
      packed_weight_cache().insert(hash_, *packed_, bytes_);
    }
  }

 private:
  Hash128 current_hash() const {
    constexpr int64_t kBytes = sizeof(S);
    const RecurrenceSizes& s = p_.sizes;
    const int64_t gates = gates_of(s.mode) * s.hidden;
    return hash_of({{p_.w_ih, gates * s.input * kBytes},
                    {p_.w_hh, gates * s.output * kBytes},
                    {p_.w_hr, s.projected() ? s.output * s.hidden * kBytes : 0}},
                   {static_cast<int64_t>(s.mode), static_cast<int64_t>(kScalarType<S>), s.input, s.hidden, s.output},
                   threads_);
  }

  RecurrenceForwardParams<S>& p_;
  const int threads_;
  const int64_t bytes_;
  bool missed_ = false;
  Hash128 hash_{};
  OptionalTensor packed_;
};

}  // namespace llm_ext
