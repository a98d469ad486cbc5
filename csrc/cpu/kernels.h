// The CPU kernel table: the functions compiled for one ISA.
//
// Every thread of a team calls a kernel with the same params. The work of a thread is done when the call returns on it;
// the caller synchronizes the team before it reads the results. Kernels do not allocate, throw or keep state. Equal
// params and team size give bit-identical results on the same ISA.
#pragma once

#include <cstdint>
#include <tuple>

#include "cpu/thread_team.h"
#include "params/attention.h"
#include "params/linear.h"
#include "params/pooling.h"
#include "params/quantized.h"
#include "params/rnn.h"
#include "params/types.h"

namespace llm_ext {

// Kernels of one direction of one recurrent layer. `threads` arguments are the number of threads available.
template <typename S>
struct RecurrenceKernels {
  int64_t (*packed_size)(const RecurrenceSizes&);                      // bytes of the packed weights
  int64_t (*forward_workspace)(const RecurrenceSizes&, int threads);   // elements of Compute<S>
  int64_t (*backward_workspace)(const RecurrenceSizes&, int threads);  // elements of Compute<S>
  int (*threads)(const RecurrenceSizes&, int threads);                 // threads worth using, at most `threads`
  // Whether `recurrences` independent recurrences of these sizes run faster with one thread per recurrence than one
  // after the other, each on the whole team.
  bool (*one_thread_per_recurrence)(const RecurrenceSizes&, int recurrences, int threads);
  // Packs the weights into `packed`. Reads the weights, the sizes and the mode, nothing else.
  void (*pack)(const RecurrenceForwardParams<S>&, void* packed, const ThreadTeam&);
  void (*forward)(const RecurrenceForwardParams<S>&, const ThreadTeam&);
  void (*backward)(const RecurrenceBackwardParams<S>&, const ThreadTeam&);
};

// Kernels of the linear system of a recurrence's tangents. Workspaces are in elements of S.
template <typename S>
struct LinearizedRecurrenceKernels {
  int (*threads)(const RecurrenceSizes&, int threads);
  int64_t (*tangent_workspace)(const RecurrenceSizes&);
  int64_t (*adjoint_workspace)(const RecurrenceSizes&);
  void (*tangent)(const RecurrenceTangentParams<S>&, const ThreadTeam&);
  void (*adjoint)(const RecurrenceAdjointParams<S>&, const ThreadTeam&);
  void (*curvature)(const RecurrenceCurvatureParams<S>&, const ThreadTeam&);
};

// Kernels of a linear layer. Workspaces are in elements of S.
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

// Kernels of attention pooling and its prefix form. Workspaces are in elements of Compute<S>.
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

// Kernels of additive attention. Workspaces are in elements of Compute<S>.
template <typename S>
struct AdditiveAttentionKernels {
  int (*threads)(const AdditiveAttentionInput<S>&, int threads);
  int64_t (*forward_workspace)(const AdditiveAttentionInput<S>&, int threads);
  int64_t (*backward_workspace)(const AdditiveAttentionInput<S>&, int threads);
  void (*forward)(const AdditiveAttentionForwardParams<S>&, const ThreadTeam&);
  void (*backward)(const AdditiveAttentionBackwardParams<S>&, const ThreadTeam&);
};

// Kernels of weights of 8 or 16 bits. Workspaces are in floats.
template <typename W>
struct QuantizedKernels {
  int (*recurrence_threads)(const RecurrenceSizes&, int threads);
  int64_t (*recurrence_workspace)(const RecurrenceSizes&, int threads);
  void (*recurrence)(const QuantizedRecurrenceParams<W>&, const ThreadTeam&);
  int (*linear_threads)(const LinearSizes&, int threads);
  int64_t (*linear_workspace)(const LinearSizes&, int threads);
  void (*linear)(const QuantizedLinearParams<W>&, const ThreadTeam&);
};
using QuantizedTables = std::tuple<QuantizedKernels<int8_t>, QuantizedKernels<BFloat16>>;

// A 128-bit content hash.
struct Hash128 {
  uint64_t a, b;
  // Spelled out: torch 2.11 builds extensions as C++17, which has no defaulted comparison.
  bool operator==(const Hash128& other) const { return a == other.a && b == other.b; }
};
constexpr int64_t kHashChunkBytes = 64 << 10;

struct Kernels {
  const char* isa;  // "baseline", "avx2", "avx512" or "avx512_bf16"
  // Hashes `bytes` of memory: one Hash128 for each chunk of kHashChunkBytes, the last of which may be shorter.
  void (*hash)(const void* data, int64_t bytes, Hash128* chunks, const ThreadTeam&);
  std::tuple<RecurrenceKernels<float>, RecurrenceKernels<double>, RecurrenceKernels<BFloat16>,
             RecurrenceKernels<Float16>>
      recurrences;
  std::tuple<LinearizedRecurrenceKernels<float>, LinearizedRecurrenceKernels<double>> linearized_recurrences;
  std::tuple<LinearKernels<float>, LinearKernels<double>> linears;
  std::tuple<PoolKernels<float>, PoolKernels<double>, PoolKernels<BFloat16>, PoolKernels<Float16>> pools;
  std::tuple<AdditiveAttentionKernels<float>, AdditiveAttentionKernels<double>, AdditiveAttentionKernels<BFloat16>,
             AdditiveAttentionKernels<Float16>>
      additive_attentions;
  QuantizedTables quantizeds;

  template <typename S>
  const RecurrenceKernels<S>& recurrence() const {
    return std::get<RecurrenceKernels<S>>(recurrences);
  }
  template <typename S>
  const LinearizedRecurrenceKernels<S>& linearized_recurrence() const {
    return std::get<LinearizedRecurrenceKernels<S>>(linearized_recurrences);
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
  template <typename W>
  const QuantizedKernels<W>& quantized() const {
    return std::get<QuantizedKernels<W>>(quantizeds);
  }
};

// The kernel table of this process, selected on the first call: the best ISA that the machine supports, or the one
// that LLM_EXT_ISA names. Throws std::runtime_error if LLM_EXT_ISA is unknown or not supported.
const Kernels& kernels();

}  // namespace llm_ext
