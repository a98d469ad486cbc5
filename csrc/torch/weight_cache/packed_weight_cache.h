// CPU only: packed weights, cached from call to call.
//
// Entries are found by a hash of the weights' content, which every call computes anew. So nothing has to be
// invalidated: after any change of the weights (by an optimizer, load_state_dict, .data, numpy, another process or a
// functional call) the hash differs, and they are packed anew. Hashing takes at most half the time of packing
// (docs/lab/packed-weight-cache.md). Two sets of weights collide with a probability of 2^-128.
#pragma once

#include <cstdint>
#include <deque>
#include <initializer_list>
#include <list>
#include <mutex>

#include "cpu/kernels.h"
#include "torch/tensor.h"

namespace llm_ext {

struct Bytes {
  const void* data;
  int64_t size;
};

// The hash of some ranges of memory and some numbers, computed by a team of `threads` threads.
Hash128 hash_of(std::initializer_list<Bytes> ranges, std::initializer_list<int64_t> numbers, int threads);

class PackedWeightCache {
 public:
  // The packed form of the weights with this hash, if it is cached.
  OptionalTensor find(const Hash128& hash);
  // Records that weights with this hash were packed because find() failed. True if that happened before, so that
  // inserting them pays; in training each set of weights is packed once. `bytes` is the size of the packed form.
  bool record_miss(const Hash128& hash, int64_t bytes);
  // The caller must have seen the same hash before and after packing: other threads may write to the weights.
  void insert(const Hash128& hash, const Tensor& packed, int64_t bytes);
  void clear();
  int64_t bytes();

 private:
  struct Entry {
    Hash128 hash;
    Tensor packed;
    int64_t bytes;
  };

  // Ops never wait for the lock: without it they pack for themselves. A process that is forked while another thread
  // holds the lock can therefore go on.
  std::mutex mutex_;
  std::list<Entry> entries_;    // most recently used first
  std::deque<Hash128> missed_;  // most recent first
  int64_t bytes_ = 0;
};

// The cache of the process.
PackedWeightCache& packed_weight_cache();

}  // namespace llm_ext
