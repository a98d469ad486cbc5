// Weights as a kernel wants them, remembered from call to call.
//
// They are found again by a hash of the bytes that they were packed from, taken anew in every call. So there is
// nothing to invalidate: however weights change (an optimizer, load_state_dict, a write through .data, numpy or another
// process, a functional call with other tensors), they are other bytes, and are packed anew. Reading them takes half of
// the time of packing them, or less.
//
// What the hash cannot tell apart would go unnoticed: two sets of weights in 2^128.
#pragma once

#include <cstdint>
#include <deque>
#include <initializer_list>
#include <list>
#include <mutex>

#include "cpu/kernels.h"
#include "torch/tensor_args.h"

namespace llm_ext {

struct Bytes {
  const void* data;
  int64_t size;
};

// Of some pieces of memory and of numbers, read by so many threads.
Hash128 hash_of(std::initializer_list<Bytes> pieces, std::initializer_list<int64_t> numbers, int threads);

class PackedWeightsStore {
 public:
  // The packed form of the weights with this hash, if it is remembered.
  OptionalTensor find(const Hash128& hash);
  // Whether weights with this hash, not found, have been packed before and are worth remembering (in training each
  // set of weights is packed once); if not, takes note that they have been now. `bytes`: of their packed form.
  bool expects(const Hash128& hash, int64_t bytes);
  // Whoever remembers must have seen the hash before and after packing: the weights may belong to other threads, too.
  void remember(const Hash128& hash, const Tensor& packed, int64_t bytes);
  void clear();
  int64_t bytes();

 private:
  struct Entry {
    Hash128 hash;
    Tensor packed;
    int64_t bytes;
  };

  // The ops never wait for it: whoever does not get it packs for himself. So a process forked while it was held goes
  // on.
  std::mutex mutex_;
  std::list<Entry> entries_;  // the one used last comes first
  std::deque<Hash128> seen_;   // packed lately, but not remembered
  int64_t bytes_ = 0;
};

// That of the process.
PackedWeightsStore& packed_weights();

}  // namespace llm_ext
