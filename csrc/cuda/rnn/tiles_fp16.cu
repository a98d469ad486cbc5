// The tile kernels for float16.
#include "cuda/rnn/tiles.cuh"

namespace llm_ext {
namespace cuda {

template <>
int tile_recurrence(const RecurrenceForward<Float16>& call, const Plan& plan, void* stream) {
  return with_cell(call.shape.mode, [&](auto cell) {
    return launch_tiles(&tile_forward<HalfArithmetic<Float16>, decltype(cell)>, call, Pass::kForward, Type::kFloat16,
                        plan, stream);
  });
}

template <>
int tile_recurrence(const RecurrenceBackward<Float16>& call, const Plan& plan, void* stream) {
  return with_cell(call.shape.mode, [&](auto cell) {
    return launch_tiles(&tile_backward<HalfArithmetic<Float16>, decltype(cell)>, call, Pass::kBackward, Type::kFloat16,
                        plan, stream);
  });
}

}  // namespace cuda
}  // namespace llm_ext
