// Sums of parts: each is read once, from the second-level cache.
//
// A block owns 32 columns of a row; each of its warps adds up every eighth part, and they add up in order.
#include <limits>

#include "cuda/device.cuh"
#include "cuda/reduce_partial_sums.h"

namespace llm_ext {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpThreads;

template <typename T>
constexpr T kNone = -std::numeric_limits<T>::infinity();

int64_t slabs_of(int64_t dim) { return dim > 0 ? (dim + kWarpThreads - 1) / kWarpThreads : 1; }

template <typename S>
struct PartsParams {
  Parts<S> parts;
  int64_t slabs;
};

template <typename S>
LLM_EXT_SHARING_KERNEL(kThreads, 4)
void add_parts_kernel(LLM_EXT_PARAMS PartsParams<S> params) {
  using T = Compute<S>;
  const Parts<S>& p = params.parts;
  const int64_t row = block_x() / params.slabs, column = block_x() % params.slabs * kWarpThreads + lane_index();
  const T* l = p.l == nullptr ? nullptr : p.l + row * p.count;
  const auto weight_of = [](T x, T max) { return x == kNone<T> ? T(0) : exp_of(x - max); };
  T max = kNone<T>, total = T(0);
  for (int64_t i = 0; l != nullptr && i < p.count; ++i) max = l[i] > max || l[i] != l[i] ? l[i] : max;
  for (int64_t i = 0; max != kNone<T> && i < p.count; ++i) total += weight_of(l[i], max);
  T sum = T(0);
  if (column < p.dim && (l == nullptr || max != kNone<T>)) {
    const T* x = p.x + row * p.count * p.dim + column;
#pragma unroll 8
    for (int64_t i = warp_index(); i < p.count; i += kWarps) {
      sum += (l == nullptr ? T(1) : weight_of(l[i], max)) * x[i * p.dim];
    }
  }
  T* shared = reinterpret_cast<T*>(shared_memory());
  shared[thread_index()] = sum;
  block_barrier();
  if (warp_index() > 0) return;
  for (int w = 1; w < kWarps; ++w) sum += shared[w * kWarpThreads + lane_index()];
  if (l != nullptr && max != kNone<T>) sum /= total;
  if (column < p.dim) p.out[row * p.dim + column] = narrow<S>(sum);
  if (p.lse != nullptr && column == 0) p.lse[row] = max == kNone<T> ? max : max + log_of(total);
}

}  // namespace

template <typename S>
int add_parts(const Parts<S>& parts, void* stream) {
  if (parts.rows == 0) return 0;
  const PartsParams<S> params = {parts, slabs_of(parts.dim)};
  LaunchShape shape;
  shape.grid_x = static_cast<unsigned>(parts.rows * params.slabs);
  shape.threads = kThreads;
  shape.shared_bytes = kThreads * sizeof(Compute<S>);
  return launch(add_parts_kernel<S>, shape, params, stream);
}

template int add_parts(const Parts<float>&, void*);
template int add_parts(const Parts<double>&, void*);
template int add_parts(const Parts<BFloat16>&, void*);
template int add_parts(const Parts<Float16>&, void*);

}  // namespace cuda
}  // namespace llm_ext
