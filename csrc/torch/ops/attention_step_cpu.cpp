// attention_step on the CPU: one step of a decoder. One team runs the layers, attention by their output y, and
// out = tanh(W_out y + b_out + context), so that only barriers separate the products.
#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "params/attention.h"
#include "params/linear.h"
#include "torch/alloc/empty.h"
#include "torch/alloc/workspace.h"
#include "torch/dtypes.h"
#include "torch/ops/additive_attention.h"
#include "torch/ops/multilayer_rnn_cpu.h"
#include "torch/ops/rnn.h"
#include "torch/stable.h"
#include "torch/tensor.h"
#include "torch/tensor_args.h"
#include "torch/threads/run_team.h"

namespace llm_ext {
namespace {

std::tuple<Tensor, Tensor, Tensor> attention_step(const std::string& mode, const Tensor& x, const Tensor& h0,
                                                  const OptionalTensor& c0, const std::vector<Tensor>& weights,
                                                  bool bias, const OptionalTensor& input_projection,
                                                  const Tensor& w_query, const Tensor& keys, const Tensor& v,
                                                  const Tensor& values, const OptionalTensor& key_lengths,
                                                  const Tensor& w_out, const OptionalTensor& b_out) {
  constexpr const char* kOp = "attention_step";
  STD_TORCH_CHECK(x.dim() >= 2 && x.size(0) == 1, kOp, ": x must be [1, N, I], or ids [1, N], got ", shape_text(x));
  STD_TORCH_CHECK(keys.dim() == 3, kOp, ": keys must be [B, Tk, A], got ", shape_text(keys));
  STD_TORCH_CHECK(values.dim() == 3, kOp, ": values must be [B, Tk, Dv], got ", shape_text(values));
  const int64_t N = x.size(1), B = keys.size(0), A = keys.size(2), Dv = values.size(2);
  STD_TORCH_CHECK(B > 0 ? N % B == 0 : N == 0, kOp, ": keys must be [B, Tk, A], the N = ", N,
                  " rows of x a multiple of B, got ", shape_text(keys));
  const OptionalTensor h0_given = h0;
  std::vector<Tensor> input_projections;
  if (input_projection.has_value()) input_projections.push_back(*input_projection);
  const MultilayerRnnArguments a = {kOp,   mode_named(kOp, mode), x,    h0_given, c0, weights, bias,
                                    false, input_projections,     kNone};
  return with_type<float, double>(h0, kOp, "h0", [&](auto type) {
    using S = decltype(type);
    MultilayerRnn<S> rnn(a);
    const int64_t H = rnn.hidden();
    AdditiveAttentionInput<S> sizes{};
    sizes.batch = B;
    sizes.queries = B > 0 ? N / B : 0;
    sizes.keys = keys.size(1);
    sizes.attn_dim = A;
    sizes.value_dim = Dv;
    const CheckedAdditiveAttentionArguments<S> attention(kOp, {}, sizes, kNone, keys, v, values, key_lengths, kNone);
    const Input<S> w_query_in(w_query, kOp, "w_query", {A, H});
    const Input<S> w_out_in(w_out, kOp, "w_out", {Dv, H});
    const Input<S> b_out_in(b_out, kOp, "b_out", {Dv});
    rnn.allocate();
    const auto [y, h_n, c_n] = rnn.results();
    const Tensor out = empty({N, Dv}, kScalarType<S>);
    if (!any_elements(out, h_n)) return std::make_tuple(out, h_n, c_n);
    const Tensor query = empty({N, A}, kScalarType<S>);
    const Tensor context = empty({N, Dv}, kScalarType<S>);

    const LinearKernels<S>& linear = kernels().linear<S>();
    const AdditiveAttentionKernels<S>& attend = kernels().additive_attention<S>();
    const LinearSizes query_sizes = {N, H, A}, out_sizes = {N, H, Dv};
    AdditiveAttentionInput<S> in = attention.in();
    in.query = data<S>(query);
    const int threads =
        std::max({rnn.threads(), team_size(linear.threads(query_sizes, max_threads())),
                  team_size(attend.threads(in, max_threads())), team_size(linear.threads(out_sizes, max_threads()))});
    rnn.prepare(threads);
    const Workspace<S> workspace(std::max({linear.forward_workspace(query_sizes), attend.forward_workspace(in, threads),
                                           linear.forward_workspace(out_sizes)}));
    S* const scratch = workspace.get();
    const S *w_query_rows = w_query_in.get(), *w_out_rows = w_out_in.get(), *b_out_row = b_out_in.get();
    run_team(threads, [&](const ThreadTeam& team) {
      rnn.run_in_turn(team);
      if (Dv == 0) return;
      linear.forward({query_sizes, data<S>(y), w_query_rows, nullptr, nullptr, false, mutable_data<S>(query), scratch},
                     team);
      team.sync();
      attend.forward({in, mutable_data<S>(context), nullptr, scratch}, team);
      team.sync();
      linear.forward(
          {out_sizes, data<S>(y), w_out_rows, b_out_row, data<S>(context), true, mutable_data<S>(out), scratch}, team);
    });
    rnn.finish();
    return std::make_tuple(out, h_n, c_n);
  });
}

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CPU, m) { m.impl("attention_step", TORCH_BOX(&llm_ext::attention_step)); }
