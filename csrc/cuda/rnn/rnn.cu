// Launches the kernel that the plan names.
#include <type_traits>

#include "cuda/rnn/generic.h"
#include "cuda/rnn/launchers.h"
#include "cuda/rnn/tiles.h"

namespace llm_ext {
namespace cuda {
namespace {

// double always has the generic plan.
template <typename Call, typename S>
int recurrence(const Call& call, const Plan& plan, S, void* stream) {
  if constexpr (!std::is_same_v<S, double>) {
    if (plan.route != Route::kGeneric) return tile_recurrence(call, plan, stream);
  }
  return generic_recurrence(call, stream);
}

}  // namespace

template <typename S>
int recurrence_forward(const RecurrenceForward<S>& params, const Plan& plan, void* stream) {
  return recurrence(params, plan, S{}, stream);
}

template <typename S>
int recurrence_backward(const RecurrenceBackward<S>& params, const Plan& plan, void* stream) {
  return recurrence(params, plan, S{}, stream);
}

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
