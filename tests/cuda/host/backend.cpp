// A device that refuses all kernels but the generic ones, which run in the emulator without its checks.
#include <cstddef>

#include "cuda/device_facts.h"
#include "cuda/rnn/generic.h"
#include "cuda/rnn/launchers.h"
#include "cuda/stream_order.h"

namespace llm_ext {
namespace cuda {

// cudaErrorCooperativeLaunchTooLarge, cudaErrorNotSupported, cudaErrorLaunchOutOfResources and
// cudaErrorInvalidClusterSize, one after the other.
int refusal() {
  static int turn = 0;
  constexpr int kErrors[] = {720, 801, 701, 912};
  return kErrors[turn++ % 4];
}

int device_facts(int, DeviceFacts* facts) {
  facts->sm = 80;
  facts->sm_count = 8;
  facts->shared_bytes = 99 * 1024;
  return 0;
}
template <typename S>
int recurrence_forward(const RecurrenceForward<S>& call, const Plan& plan, void* stream) {
  if (plan.route != Route::kGeneric) return refusal();
  return generic_recurrence(call, stream);
}
template <typename S>
int recurrence_backward(const RecurrenceBackward<S>& call, const Plan& plan, void* stream) {
  if (plan.route != Route::kGeneric) return refusal();
  return generic_recurrence(call, stream);
}
const char* error_text(int) { return "refused"; }
int new_event(void**) { return 0; }
int record_event(void*, void*) { return 0; }
int await_event(void*, void*) { return 0; }
uint64_t capture_of(void*) { return 0; }

#define FOR(S)                                                                      \
  template int recurrence_forward(const RecurrenceForward<S>&, const Plan&, void*); \
  template int recurrence_backward(const RecurrenceBackward<S>&, const Plan&, void*);
FOR(float)
FOR(double)
FOR(BFloat16)
FOR(Float16)

}  // namespace cuda
}  // namespace llm_ext
