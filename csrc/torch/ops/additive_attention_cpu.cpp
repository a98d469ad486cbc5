// additive_attention_* on the CPU.
#include <cstdint>
#include <initializer_list>

#include "cpu/kernels.h"
#include "torch/alloc/workspace.h"
#include "torch/ops/additive_attention.h"
#include "torch/threads/run_team.h"

namespace llm_ext {
namespace {

struct AdditiveAttentionCpu {
  static void check_sizes(const char*, std::initializer_list<int64_t>) {}

  template <typename S>
  static void forward(AdditiveAttentionForwardParams<S>& p, const Device&) {
    const AdditiveAttentionKernels<S>& kernel = kernels().additive_attention<S>();
    const int threads = team_size(kernel.threads(p.in, max_threads()));
    const Workspace<Compute<S>> workspace(kernel.forward_workspace(p.in, threads));
    p.workspace = workspace.get();
    run_team(threads, [&](const ThreadTeam& team) { kernel.forward(p, team); });
  }

  template <typename S>
  static void backward(AdditiveAttentionBackwardParams<S>& p, const Device&) {
    const AdditiveAttentionKernels<S>& kernel = kernels().additive_attention<S>();
    const int threads = team_size(kernel.threads(p.in, max_threads()));
    const Workspace<Compute<S>> workspace(kernel.backward_workspace(p.in, threads));
    p.workspace = workspace.get();
    run_team(threads, [&](const ThreadTeam& team) { kernel.backward(p, team); });
  }
};

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CPU, m) {
  m.impl("additive_attention_forward", TORCH_BOX(&llm_ext::additive_attention_forward<llm_ext::AdditiveAttentionCpu>));
  m.impl("additive_attention_backward",
         TORCH_BOX(&llm_ext::additive_attention_backward<llm_ext::AdditiveAttentionCpu>));
}
