// Attention on NVIDIA GPUs: workspace, plan, launch. All of it is queued on torch's current stream: nothing here waits
// for the device.
#include "cuda/attention.h"
#include "torch/attention_pool.h"
#include "torch/on_device.h"

namespace llm_ext {
namespace {

// So many elements that live as long as the call, aligned; null where there are none.
template <typename T>
class Workspace {
 public:
  Workspace(int64_t elements, const Place& place) {
    if (elements > 0) tensor_ = empty({elements}, kScalarType<T>, place);
  }
  T* get() const { return tensor_.has_value() ? mutable_data<T>(*tensor_) : nullptr; }

 private:
  OptionalTensor tensor_;
};

struct Cuda {
  template <typename S>
  static void forward(PoolForwardParams<S>& p, const Place& place) {
    run(
        "attention_pool_forward", p, place,
        [&](const cuda::PoolPlan& plan) { return cuda::pool_forward_workspace(p.in.batch, p.in.dim, plan); },
        cuda::pool_forward<S>);
  }
  template <typename S>
  static void backward(PoolBackwardParams<S>& p, const Place& place) {
    run(
        "attention_pool_backward", p, place,
        [&](const cuda::PoolPlan& plan) { return cuda::pool_backward_workspace(p.in.batch, p.in.dim, plan); },
        cuda::pool_backward<S>);
  }
  template <typename S>
  static void prefix_forward(PrefixPoolForwardParams<S>& p, const Place& place) {
    run(
        "prefix_pool_forward", p, place,
        [&](const cuda::PoolPlan& plan) {
          return cuda::prefix_pool_forward_workspace(p.in.batch, p.in.steps, p.in.dim, plan);
        },
        cuda::prefix_pool_forward<S>);
  }
  template <typename S>
  static void prefix_backward(PrefixPoolBackwardParams<S>& p, const Place& place) {
    run(
        "prefix_pool_backward", p, place,
        [&](const cuda::PoolPlan& plan) {
          return cuda::prefix_pool_backward_workspace(p.in.batch, p.in.steps, p.in.dim, plan);
        },
        cuda::prefix_pool_backward<S>);
  }

 private:
  template <template <typename> class Params, typename S, typename Elements>
  static void run(const char* op, Params<S>& p, const Place& place, const Elements& elements,
                  int (*launch)(const Params<S>&, const cuda::PoolPlan&, void*)) {
    const OnDevice on(op, place.index);
    const cuda::PoolPlan plan = cuda::make_pool_plan(p.in.batch, p.in.steps, p.in.dim, sizeof(S), on.facts.sm_count);
    const Workspace<Compute<S>> workspace(elements(plan), place);
    p.workspace = workspace.get();
    check_queued(op, launch(p, plan, on.stream));
  }
};

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CUDA, m) {
  m.impl("attention_pool_forward", TORCH_BOX(&llm_ext::attention_pool_forward<llm_ext::Cuda>));
  m.impl("attention_pool_backward", TORCH_BOX(&llm_ext::attention_pool_backward<llm_ext::Cuda>));
  m.impl("prefix_pool_forward", TORCH_BOX(&llm_ext::prefix_pool_forward<llm_ext::Cuda>));
  m.impl("prefix_pool_backward", TORCH_BOX(&llm_ext::prefix_pool_backward<llm_ext::Cuda>));
}
