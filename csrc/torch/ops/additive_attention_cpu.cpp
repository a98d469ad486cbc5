// Additive attention on the CPU: allocate the workspace, launch.
#include "cpu/kernels.h"
#include "torch/ops/additive_attention.h"
#include "torch/tensor_args.h"
#include "torch/stable.h"

namespace llm_ext {
namespace {

struct Cpu {
  template <typename S>
  static void forward(AdditiveAttentionForwardParams<S>& p, const Place&) {
    const AdditiveAttentionKernels<S>& kernel = kernels().additive_attention<S>();
    const int threads = team_size(kernel.threads(p.in, max_threads()));
    const Tensor workspace = empty({kernel.forward_workspace(p.in, threads)}, kScalarType<Compute<S>>);
    p.workspace = mutable_data<Compute<S>>(workspace);
    run_team(threads, [&](const ThreadTeam& team) { kernel.forward(p, team); });
  }

  template <typename S>
  static void backward(AdditiveAttentionBackwardParams<S>& p, const Place&) {
    const AdditiveAttentionKernels<S>& kernel = kernels().additive_attention<S>();
    const int threads = team_size(kernel.threads(p.in, max_threads()));
    const Tensor workspace = empty({kernel.backward_workspace(p.in, threads)}, kScalarType<Compute<S>>);
    p.workspace = mutable_data<Compute<S>>(workspace);
    run_team(threads, [&](const ThreadTeam& team) { kernel.backward(p, team); });
  }
};

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CPU, m) {
  m.impl("additive_attention_forward", TORCH_BOX(&llm_ext::additive_attention_forward<llm_ext::Cpu>));
  m.impl("additive_attention_backward", TORCH_BOX(&llm_ext::additive_attention_backward<llm_ext::Cpu>));
}
