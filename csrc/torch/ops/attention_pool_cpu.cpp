// attention_pool_* and prefix_pool_* on the CPU.
#include <cstdint>
#include <initializer_list>

#include "cpu/kernels.h"
#include "torch/alloc/workspace.h"
#include "torch/ops/attention_pool.h"
#include "torch/threads/run_team.h"

namespace llm_ext {
namespace {

struct PoolCpu {
  static void check_sizes(const char*, std::initializer_list<int64_t>) {}

  template <typename S>
  static void forward(PoolForwardParams<S>& p, const Device&) {
    run(p, kernels().pool<S>().workspace, kernels().pool<S>().forward);
  }
  template <typename S>
  static void backward(PoolBackwardParams<S>& p, const Device&) {
    run(p, kernels().pool<S>().workspace, kernels().pool<S>().backward);
  }
  template <typename S>
  static void prefix_forward(PrefixPoolForwardParams<S>& p, const Device&) {
    run(p, kernels().pool<S>().prefix_workspace, kernels().pool<S>().prefix_forward);
  }
  template <typename S>
  static void prefix_backward(PrefixPoolBackwardParams<S>& p, const Device&) {
    run(p, kernels().pool<S>().prefix_workspace, kernels().pool<S>().prefix_backward);
  }

 private:
  template <template <typename> class Params, typename S>
  static void run(Params<S>& p, int64_t (*workspace_size)(const PoolInput<S>&, int),
                  void (*kernel)(const Params<S>&, const ThreadTeam&)) {
    const int threads = team_size(kernels().pool<S>().threads(p.in, max_threads()));
    const Workspace<Compute<S>> workspace(workspace_size(p.in, threads));
    p.workspace = workspace.get();
    run_team(threads, [&](const ThreadTeam& team) { kernel(p, team); });
  }
};

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CPU, m) {
  m.impl("attention_pool_forward", TORCH_BOX(&llm_ext::attention_pool_forward<llm_ext::PoolCpu>));
  m.impl("attention_pool_backward", TORCH_BOX(&llm_ext::attention_pool_backward<llm_ext::PoolCpu>));
  m.impl("prefix_pool_forward", TORCH_BOX(&llm_ext::prefix_pool_forward<llm_ext::PoolCpu>));
  m.impl("prefix_pool_backward", TORCH_BOX(&llm_ext::prefix_pool_backward<llm_ext::PoolCpu>));
}
