// Pooling and attention on NVIDIA GPUs: plan, workspace, launch. All work is queued on torch's current stream: nothing
// here waits for the device.
#include <cstdint>
#include <initializer_list>

#include "cuda/attention/launchers.h"
#include "cuda/pooling/launchers.h"
#include "torch/alloc/workspace.h"
#include "torch/ops/additive_attention.h"
#include "torch/ops/attention_pool.h"
#include "torch/ops/cuda_device.h"

namespace llm_ext {
namespace {

struct Cuda {
  // Kernels use int for some sizes.
  static void check_sizes(const char* op, std::initializer_list<int64_t> sizes) {
    for (int64_t size : sizes) {
      STD_TORCH_CHECK(size < int64_t{1} << 31, op, ": sizes must be below 2^31 on cuda, got ", size);
    }
  }

  template <typename S>
  static void forward(PoolForwardParams<S>& p, const Device& device) {
    pool("attention_pool_forward", p, device, cuda::make_pool_plan, cuda::pool_forward_workspace,
         cuda::pool_forward<S>);
  }
  template <typename S>
  static void backward(PoolBackwardParams<S>& p, const Device& device) {
    pool("attention_pool_backward", p, device, cuda::make_pool_gradient_plan, cuda::pool_backward_workspace,
         cuda::pool_backward<S>);
  }
  template <typename S>
  static void prefix_forward(PrefixPoolForwardParams<S>& p, const Device& device) {
    pool("prefix_pool_forward", p, device, cuda::make_pool_plan, cuda::prefix_pool_forward_workspace,
         cuda::prefix_pool_forward<S>);
  }
  template <typename S>
  static void prefix_backward(PrefixPoolBackwardParams<S>& p, const Device& device) {
    pool("prefix_pool_backward", p, device, cuda::make_prefix_gradient_plan, cuda::prefix_pool_backward_workspace,
         cuda::prefix_pool_backward<S>);
  }

  template <typename S>
  static void forward(AdditiveAttentionForwardParams<S>& p, const Device& device) {
    additive("additive_attention_forward", p, device, false, cuda::additive_attention_forward<S>);
  }
  template <typename S>
  static void backward(AdditiveAttentionBackwardParams<S>& p, const Device& device) {
    additive("additive_attention_backward", p, device, true, cuda::additive_attention_backward<S>);
  }

 private:
  template <template <typename> class Params, typename S>
  static void pool(const char* op, Params<S>& p, const Device& device, decltype(cuda::make_pool_plan)& plan_of,
                   decltype(cuda::pool_forward_workspace)& workspace_of,
                   int (*launch)(const Params<S>&, const cuda::PoolPlan&, void*)) {
    const PoolInput<S>& in = p.in;
    const CudaDevice on(op, device.index);
    const cuda::PoolPlan plan = plan_of(in.batch, in.steps, in.dim, sizeof(S), on.facts());
    const Workspace<Compute<S>> workspace(workspace_of(in.batch, in.steps, in.dim, plan), device);
    p.workspace = workspace.get();
    check_queued(op, launch(p, plan, on.stream()));
  }

  template <template <typename> class Params, typename S>
  static void additive(const char* op, Params<S>& p, const Device& device, bool backward,
                       int (*launch)(const Params<S>&, int64_t, void*)) {
    const AdditiveAttentionInput<S>& in = p.in;
    const CudaDevice on(op, device.index);
    const int64_t slab = cuda::additive_slab(in.queries, in.keys, in.attn_dim);
    const Workspace<Compute<S>> workspace(cuda::AdditiveWorkspace<S>(in, slab, backward, nullptr).elements, device);
    p.workspace = workspace.get();
    check_queued(op, launch(p, slab, on.stream()));
  }
};

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CUDA, m) {
  m.impl("attention_pool_forward", TORCH_BOX(&llm_ext::attention_pool_forward<llm_ext::Cuda>));
  m.impl("attention_pool_backward", TORCH_BOX(&llm_ext::attention_pool_backward<llm_ext::Cuda>));
  m.impl("prefix_pool_forward", TORCH_BOX(&llm_ext::prefix_pool_forward<llm_ext::Cuda>));
  m.impl("prefix_pool_backward", TORCH_BOX(&llm_ext::prefix_pool_backward<llm_ext::Cuda>));
  m.impl("additive_attention_forward", TORCH_BOX(&llm_ext::additive_attention_forward<llm_ext::Cuda>));
  m.impl("additive_attention_backward", TORCH_BOX(&llm_ext::additive_attention_backward<llm_ext::Cuda>));
}
