// The tile kernels for float32, multiplied as float32 or, if the plan says so, as TF32.
#include "cuda/rnn/tiles.cuh"

namespace llm_ext {
namespace cuda {

template <>
int tile_recurrence(const RecurrenceForward<float>& call, const Plan& plan, void* stream) {
  return with_cell(call.shape.mode, [&](auto cell) {
    using C = decltype(cell);
    const auto kernel = plan.tf32 ? &tile_forward<Tf32Arithmetic, C> : &tile_forward<FloatArithmetic, C>;
    return launch_tiles(kernel, call, Pass::kForward, Type::kFloat32, plan, stream);
  });
}

template <>
int tile_recurrence(const RecurrenceBackward<float>& call, const Plan& plan, void* stream) {
  return with_cell(call.shape.mode, [&](auto cell) {
    using C = decltype(cell);
    const auto kernel = plan.tf32 ? &tile_backward<Tf32Arithmetic, C> : &tile_backward<FloatArithmetic, C>;
    return launch_tiles(kernel, call, Pass::kBackward, Type::kFloat32, plan, stream);
  });
}

}  // namespace cuda
}  // namespace llm_ext
