// From a plan to its kernel, and what a device can do.
#include "cuda/device.cuh"
#include "cuda/generic.h"
#include "cuda/kernels.h"

namespace llm_ext {
namespace cuda {

template <typename S>
int recurrence_forward(const RecurrenceForward<S>& params, const Plan&, void* stream) {
  return generic_recurrence(params, stream);
}

template <typename S>
int recurrence_backward(const RecurrenceBackward<S>& params, const Plan&, void* stream) {
  return generic_recurrence(params, stream);
}

int device_facts(int device, DeviceFacts* facts) { return query_device(device, facts); }

const char* error_text(int error) { return error_text_of(error); }

bool capturing(void* stream) { return is_captured(stream); }

template int recurrence_forward(const RecurrenceForward<float>&, const Plan&, void*);
template int recurrence_forward(const RecurrenceForward<double>&, const Plan&, void*);
template int recurrence_forward(const RecurrenceForward<BFloat16>&, const Plan&, void*);
template int recurrence_forward(const RecurrenceForward<Float16>&, const Plan&, void*);
template int recurrence_backward(const RecurrenceBackward<float>&, const Plan&, void*);
template int recurrence_backward(const RecurrenceBackward<double>&, const Plan&, void*);
template int recurrence_backward(const RecurrenceBackward<BFloat16>&, const Plan&, void*);
template int recurrence_backward(const RecurrenceBackward<Float16>&, const Plan&, void*);

}  // namespace cuda
}  // namespace llm_ext
