// Reads each partial sum once, from the L2 cache.
//
// A block owns 32 columns of a row. Each of its warps adds every eighth partial sum; the warps' sums are added in
// order. The lanes of every warp share the log-sum-exps: one by one, 256 of them would take longer than the sums.
#include "cuda/device.cuh"
#include "cuda/log_sum.cuh"
#include "cuda/reduce_partial_sums.h"

namespace llm_ext {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpThreads;

int64_t column_blocks_of(int64_t dim) { return dim > 0 ? (dim + kWarpThreads - 1) / kWarpThreads : 1; }

template <typename S>
struct ReduceParams {
  PartialSums<S> sums;
  int64_t column_blocks;
};

template <typename S>
LLM_EXT_SHARING_KERNEL(kThreads, 4)
void reduce_partial_sums_kernel(LLM_EXT_PARAMS ReduceParams<S> params) {
  using T = Compute<S>;
  const PartialSums<S>& p = params.sums;
  const int64_t row = block_x() / params.column_blocks;
  const int64_t column = block_x() % params.column_blocks * kWarpThreads + lane_index();
  const LogSum<T>* l = p.l == nullptr ? nullptr : p.l + row * p.count;
  const auto weight_of = [](const LogSum<T>& x, T max) { return x.sum * share_of(x.max - max); };
  T max = -kInfinity<T>, total = T(0);
  if (l != nullptr) {
    const auto rise_to = [&](T x) { max = x > max || x != x ? x : max; };
    for (int64_t i = lane_index(); i < p.count; i += kWarpThreads) rise_to(l[i].max);
#pragma unroll
    for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) rise_to(shuffle_xor(max, mask));
    for (int64_t i = lane_index(); max != -kInfinity<T> && i < p.count; i += kWarpThreads)
      total += weight_of(l[i], max);
#pragma unroll
    for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  }
  T sum = T(0);
  if (column < p.dim && (l == nullptr || max != -kInfinity<T>)) {
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
  if (l != nullptr && max != -kInfinity<T>) sum /= total;
  if (column < p.dim) p.out[row * p.dim + column] = narrow<S>(sum);
  if (l != nullptr && column == 0) {
    p.l_out[row] = {max, total};
    p.lse[row] = log_sum_exp(p.l_out[row]);
  }
}

}  // namespace

template <typename S>
int reduce_partial_sums(const PartialSums<S>& sums, void* stream) {
  if (sums.rows == 0) return 0;
  const ReduceParams<S> params = {sums, column_blocks_of(sums.dim)};
  LaunchShape shape;
  shape.grid_x = sums.rows * params.column_blocks;
  shape.threads = kThreads;
  shape.shared_bytes = kThreads * sizeof(Compute<S>);
  return launch(reduce_partial_sums_kernel<S>, shape, params, stream);
}

template int reduce_partial_sums(const PartialSums<float>&, void*);
template int reduce_partial_sums(const PartialSums<double>&, void*);
template int reduce_partial_sums(const PartialSums<BFloat16>&, void*);
template int reduce_partial_sums(const PartialSums<Float16>&, void*);

}  // namespace cuda
}  // namespace llm_ext
