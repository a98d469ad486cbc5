// The table of CPU kernels. Every kernel is called by all threads of a team at once, with the same params, and has
// finished for a thread when it returns there; the caller joins the team before it reads the results. Kernels do not
// allocate, throw or keep state. The same params and the same team size give the same bits.
#pragma once

#include <cstdint>

#include "cpu/team.h"
#include "params.h"

namespace llm_ext {

template <typename T>
struct KernelsOf {
  // Elements of workspace the call needs, and the number of threads worth giving it (at most `threads`).
  int64_t (*recurrence_forward_workspace)(const RecurrenceSizes<T>&);
  int64_t (*recurrence_backward_workspace)(const RecurrenceSizes<T>&, int threads);
  int (*recurrence_threads)(const RecurrenceSizes<T>&, int threads);
  void (*recurrence_forward)(const RecurrenceForwardParams<T>&, const Team&);
  void (*recurrence_backward)(const RecurrenceBackwardParams<T>&, const Team&);

  int (*pool_threads)(const PoolInput<T>&, int threads);
  int64_t (*pool_workspace)(const PoolInput<T>&, int threads);
  void (*pool_forward)(const PoolForwardParams<T>&, const Team&);
  void (*pool_backward)(const PoolBackwardParams<T>&, const Team&);

  int64_t (*prefix_pool_workspace)(const PoolInput<T>&, int threads);
  void (*prefix_pool_forward)(const PrefixPoolForwardParams<T>&, const Team&);
  void (*prefix_pool_backward)(const PrefixPoolBackwardParams<T>&, const Team&);
};

struct Kernels {
  const char* level;  // "baseline", "avx2" or "avx512"
  KernelsOf<float> f32;
  KernelsOf<double> f64;

  template <typename T>
  const KernelsOf<T>& of() const;
};

template <>
inline const KernelsOf<float>& Kernels::of<float>() const {
  return f32;
}
template <>
inline const KernelsOf<double>& Kernels::of<double>() const {
  return f64;
}

// The table for this machine, chosen once: the highest level it has, or the one LLM_EXT_SIMD names.
// Throws std::runtime_error if LLM_EXT_SIMD names a level that does not exist or that the machine lacks.
const Kernels& kernels();

}  // namespace llm_ext
