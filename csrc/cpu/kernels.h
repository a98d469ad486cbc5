// The table of CPU kernels. Every kernel is called by all threads of a team at once, with the same params, and has
// finished for a thread when it returns there; the caller joins the team before it reads the results. Kernels do not
// allocate, throw or keep state. The same params and the same team size give the same bits.
#pragma once

#include <cstdint>
#include <tuple>

#include "cpu/thread_team.h"
#include "params/attention.h"
#include "params/linear.h"
#include "params/pooling.h"
#include "params/rnn.h"

namespace llm_ext {

// Of a recurrence whose tensors are stored as S.
template <typename S>
struct RecurrenceKernels {
  // Bytes of packed weights and elements of workspace that the call needs, and the number of threads worth giving it
  // (at most `threads`).
  int64_t (*packed_size)(const RecurrenceSizes&);
  int64_t (*forward_workspace)(const RecurrenceSizes&, int threads);
  int64_t (*backward_workspace)(const RecurrenceSizes&, int threads);
  int (*threads)(const RecurrenceSizes&, int threads);
  // Whether so many recurrences of these sizes that can run at once are better run by a thread each than one after the
  // other by the whole team.
  bool (*one_thread_per_recurrence)(const RecurrenceSizes&, int recurrences, int threads);
  // Packs the weights; depends on nothing but them, their sizes and the cell. `packed` of the params is not read.
  void (*pack)(const RecurrenceForwardParams<S>&, void* packed, const ThreadTeam&);
  void (*forward)(const RecurrenceForwardParams<S>&, const ThreadTeam&);
  void (*backward)(const RecurrenceBackwardParams<S>&, const ThreadTeam&);
};

// 128 bits that stand for some bytes.
struct Hash128 {
  uint64_t a, b;
  // Written out: torch 2.11 builds in C++17.
  bool operator==(const Hash128& other) const { return a == other.a && b == other.b; }
};
constexpr int64_t kHashChunkBytes = 64 << 10;

// Of affine maps of rows.
template <typename S>
struct LinearKernels {
  int (*threads)(const LinearSizes&, int threads);
  int64_t (*forward_workspace)(const LinearSizes&);
  int64_t (*argmax_workspace)(const LinearSizes&, int threads);
  int64_t (*backward_workspace)(const LinearSizes&, int threads);
  void (*forward)(const LinearForwardParams<S>&, const ThreadTeam&);
  void (*argmax)(const LinearArgmaxParams<S>&, const ThreadTeam&);
  void (*backward)(const LinearBackwardParams<S>&, const ThreadTeam&);
};

// Of pooling and its prefix form; workspaces in elements of what S is computed in.
template <typename S>
struct PoolKernels {
  int (*threads)(const PoolInput<S>&, int threads);
  int64_t (*workspace)(const PoolInput<S>&, int threads);
  void (*forward)(const PoolForwardParams<S>&, const ThreadTeam&);
  void (*backward)(const PoolBackwardParams<S>&, const ThreadTeam&);
  int64_t (*prefix_workspace)(const PoolInput<S>&, int threads);
  void (*prefix_forward)(const PrefixPoolForwardParams<S>&, const ThreadTeam&);
  void (*prefix_backward)(const PrefixPoolBackwardParams<S>&, const ThreadTeam&);
};

// Of additive attention whose tensors are stored as S.
template <typename S>
struct AdditiveAttentionKernels {
  int (*threads)(const AdditiveAttentionInput<S>&, int threads);
  int64_t (*forward_workspace)(const AdditiveAttentionInput<S>&, int threads);
  int64_t (*backward_workspace)(const AdditiveAttentionInput<S>&, int threads);
  void (*forward)(const AdditiveAttentionForwardParams<S>&, const ThreadTeam&);
  void (*backward)(const AdditiveAttentionBackwardParams<S>&, const ThreadTeam&);
};

struct Kernels {
  const char* isa;  // "baseline", "avx2", "avx512" or "avx512_bf16"
  // Digests of `bytes` of memory, in pieces of kHashChunkBytes bytes, one for each.
  void (*hash)(const void* data, int64_t bytes, Hash128* pieces, const ThreadTeam&);
  std::tuple<RecurrenceKernels<float>, RecurrenceKernels<double>, RecurrenceKernels<BFloat16>,
             RecurrenceKernels<Float16>>
      recurrences;
  std::tuple<LinearKernels<float>, LinearKernels<double>> linears;
  std::tuple<PoolKernels<float>, PoolKernels<double>, PoolKernels<BFloat16>, PoolKernels<Float16>> pools;
  std::tuple<AdditiveAttentionKernels<float>, AdditiveAttentionKernels<double>, AdditiveAttentionKernels<BFloat16>,
             AdditiveAttentionKernels<Float16>>
      additive_attentions;

  template <typename S>
  const RecurrenceKernels<S>& recurrence() const {
    return std::get<RecurrenceKernels<S>>(recurrences);
  }
  template <typename S>
  const LinearKernels<S>& linear() const {
    return std::get<LinearKernels<S>>(linears);
  }
  template <typename S>
  const PoolKernels<S>& pool() const {
    return std::get<PoolKernels<S>>(pools);
  }
  template <typename S>
  const AdditiveAttentionKernels<S>& additive_attention() const {
    return std::get<AdditiveAttentionKernels<S>>(additive_attentions);
  }
};

// The table for this machine, chosen once: the highest level it has, or the one LLM_EXT_ISA names.
// Throws std::runtime_error if LLM_EXT_ISA names a level that does not exist or that the machine lacks.
const Kernels& kernels();

}  // namespace llm_ext
