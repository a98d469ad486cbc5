// The tile kernels for bfloat16.
#include "cuda/rnn/tiles.cuh"

namespace llm_ext {
namespace cuda {

template <>
int tile_recurrence(const RecurrenceForward<BFloat16>& call, const Plan& plan, void* stream) {
  return with_cell(call.shape.mode, [&](auto cell) {
    return launch_tiles(&tile_forward<HalfArithmetic<BFloat16>, decltype(cell)>, call, Pass::kForward, Type::kBFloat16,
                        plan, stream);
  });
}

template <>
int tile_recurrence(const RecurrenceBackward<BFloat16>& call, const Plan& plan, void* stream) {
  return with_cell(call.shape.mode, [&](auto cell) {
    return launch_tiles(&tile_backward<HalfArithmetic<BFloat16>, decltype(cell)>, call, Pass::kBackward,
                        Type::kBFloat16, plan, stream);
  });
}

// All tile kernels use the same resources; one of them represents all.
int resident_tile_clusters(int blocks, int64_t shared_bytes) {
  LaunchShape shape;
  shape.threads = max_warps(Type::kBFloat16) * kWarpThreads;
  shape.cluster = static_cast<unsigned>(blocks);
  shape.shared_bytes = static_cast<size_t>(shared_bytes);
  return resident_clusters(&tile_forward<HalfArithmetic<BFloat16>, Lstm>, shape);
}

}  // namespace cuda
}  // namespace llm_ext
