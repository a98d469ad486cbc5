// linear_* on the CPU. On other devices llm_ext/ops/linear.py calls torch's own.
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "params/linear.h"
#include "torch/alloc/empty.h"
#include "torch/alloc/workspace.h"
#include "torch/dtypes.h"
#include "torch/stable.h"
#include "torch/tensor.h"
#include "torch/tensor_args.h"
#include "torch/threads/run_team.h"

namespace llm_ext {
namespace {

// Checked sizes and inputs of the three ops. Owns dense copies for the duration of the call.
template <typename S>
class CheckedLinearArguments {
 public:
  CheckedLinearArguments(const char* op, const Tensor& x, const Tensor& w, const OptionalTensor& b = kNone,
                         const OptionalTensor& grad_y = kNone)
      : op_(op),
        shape_(shape_of(x, w)),
        w_(w, op, "w", {sizes_.output, sizes_.input}),
        b_(b, op, "b", {sizes_.output}) {
    check_rows("x", x, sizes_.input);
    if (grad_y.has_value()) check_rows("grad_y", *grad_y, sizes_.output);
    // After all other checks: they may be large views of little memory.
    x_ = dense(x);
    if (grad_y.has_value()) grad_y_ = dense(*grad_y);
  }

  const LinearSizes& sizes() const { return sizes_; }
  const S* x() const { return data<S>(x_); }
  const S* w() const { return w_.get(); }
  const S* b() const { return b_.get(); }
  const S* grad_y() const { return data<S>(*grad_y_); }

  // [*] int64: an index for each row.
  Tensor empty_indices() const {
    return empty(shape_.data(), static_cast<int64_t>(shape_.size()) - 1, ScalarType::Long);
  }
  // [*, width].
  Tensor empty_rows(int64_t width) const {
    std::vector<int64_t> shape = shape_;
    shape.back() = width;
    return empty(shape.data(), static_cast<int64_t>(shape.size()), kScalarType<S>);
  }

 private:
  // t must be [*, width], * being that of x.
  void check_rows(const char* name, const Tensor& t, int64_t width) const {
    STD_TORCH_CHECK(t.is_cpu(), op_, ": ", name, " must be on cpu");
    STD_TORCH_CHECK(t.scalar_type() == kScalarType<S>, op_, ": ", name, " must have the dtype of the others");
    STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(shape_.size()), op_, ": ", name,
                    " must have as many dimensions as x");
    for (int64_t i = 0; i < t.dim(); ++i) {
      const int64_t size = i + 1 < t.dim() ? shape_[i] : width;
      STD_TORCH_CHECK(t.size(i) == size, op_, ": ", name, " must have the sizes of x, but ", width,
                      " as the last one, got ", shape_text(t));
    }
  }

  std::vector<int64_t> shape_of(const Tensor& x, const Tensor& w) {
    STD_TORCH_CHECK(x.dim() >= 1, op_, ": x must be [*, I], got ", shape_text(x));
    STD_TORCH_CHECK(w.dim() == 2, op_, ": w must be [O, I], got ", shape_text(w));
    std::vector<int64_t> shape;
    sizes_ = {1, w.size(1), w.size(0)};
    check_volume(x, op_, "x");
    for (int64_t i = 0; i < x.dim(); ++i) {
      shape.push_back(x.size(i));
      if (i + 1 < x.dim()) sizes_.rows *= x.size(i);
    }
    return shape;
  }

  // In this order: each is initialized from those above it.
  const char* op_;
  LinearSizes sizes_{};
  const std::vector<int64_t> shape_;
  const Input<S> w_;
  const Input<S> b_;
  Tensor x_;
  OptionalTensor grad_y_;
};

Tensor linear_forward(const Tensor& x, const Tensor& w, const OptionalTensor& b) {
  constexpr const char* kOp = "linear_forward";
  return with_type<float, double>(x, kOp, "x", [&](auto type) {
    using S = decltype(type);
    const CheckedLinearArguments<S> a(kOp, x, w, b);
    const LinearSizes& s = a.sizes();
    const Tensor y = a.empty_rows(s.output);
    const LinearKernels<S>& kernel = kernels().linear<S>();
    const int threads = team_size(kernel.threads(s, max_threads()));
    const Workspace<S> workspace(kernel.forward_workspace(s));
    const LinearForwardParams<S> p = {s, a.x(), a.w(), a.b(), nullptr, false, mutable_data<S>(y), workspace.get()};
    if (any_elements(y)) run_team(threads, [&](const ThreadTeam& team) { kernel.forward(p, team); });
    return y;
  });
}

Tensor linear_argmax(const Tensor& x, const Tensor& w, const OptionalTensor& b) {
  constexpr const char* kOp = "linear_argmax";
  return with_type<float, double>(x, kOp, "x", [&](auto type) {
    using S = decltype(type);
    // The kernel computes indices in vectors of 32-bit integers.
    STD_TORCH_CHECK(w.dim() == 2 && w.size(0) > 0 && w.size(0) <= std::numeric_limits<int32_t>::max(), kOp,
                    ": w must be [O, I], 0 < O < 2^31, got ", shape_text(w));
    const CheckedLinearArguments<S> a(kOp, x, w, b);
    const LinearSizes& s = a.sizes();
    const Tensor indices = a.empty_indices();
    const LinearKernels<S>& kernel = kernels().linear<S>();
    const int threads = team_size(kernel.threads(s, max_threads()));
    const Workspace<S> workspace(kernel.argmax_workspace(s, threads));
    const LinearArgmaxParams<S> p = {s, a.x(), a.w(), a.b(), mutable_data<int64_t>(indices), workspace.get()};
    if (any_elements(indices)) run_team(threads, [&](const ThreadTeam& team) { kernel.argmax(p, team); });
    return indices;
  });
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad_y, const Tensor& x, const Tensor& w, bool need_dx,
                                                   bool need_dw, bool need_db) {
  constexpr const char* kOp = "linear_backward";
  return with_type<float, double>(x, kOp, "x", [&](auto type) {
    using S = decltype(type);
    const CheckedLinearArguments<S> a(kOp, x, w, kNone, grad_y);
    const LinearSizes& s = a.sizes();
    const Output<S> none(false, {});
    const Tensor dx = need_dx ? a.empty_rows(s.input) : none.tensor();
    const Output<S> dw(need_dw, {s.output, s.input});
    const Output<S> db(need_db, {s.output});
    const LinearKernels<S>& kernel = kernels().linear<S>();
    const int threads = team_size(kernel.threads(s, max_threads()));
    const Workspace<S> workspace(kernel.backward_workspace(s, threads));
    const LinearBackwardParams<S> p = {
        s, a.grad_y(), a.x(), a.w(), need_dx ? mutable_data<S>(dx) : nullptr, dw.get(), db.get(), workspace.get()};
    if (any_elements(dx, dw.tensor(), db.tensor())) {
      run_team(threads, [&](const ThreadTeam& team) { kernel.backward(p, team); });
    }
    return std::make_tuple(dx, dw.tensor(), db.tensor());
  });
}

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(&llm_ext::linear_forward));
  m.impl("linear_argmax", TORCH_BOX(&llm_ext::linear_argmax));
  m.impl("linear_backward", TORCH_BOX(&llm_ext::linear_backward));
}
