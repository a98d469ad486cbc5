// A layer on NVIDIA GPUs: check, allocate, multiply, launch. One kernel launch of csrc/cuda/rnn runs the loop over time
// for one or both directions; products over the whole sequence are torch's. All work is queued on torch's current
// stream: nothing here waits for the device.
#include "torch/ops/rnn_layer_cuda.h"

#include <algorithm>
#include <deque>
#include <initializer_list>
#include <optional>
#include <vector>

#include "cuda/rnn/launchers.h"
#include "torch/ops/cuda_device.h"
#include "torch/ops/cuda_matrix.h"
#include "torch/ops/cuda_sequence_products.h"
#include "torch/ops/rnn.h"

namespace llm_ext {
namespace {

template <typename S>
constexpr cuda::Type kType = cuda::Type::kFloat32;
template <>
inline constexpr cuda::Type kType<double> = cuda::Type::kFloat64;
template <>
inline constexpr cuda::Type kType<BFloat16> = cuda::Type::kBFloat16;
template <>
inline constexpr cuda::Type kType<Float16> = cuda::Type::kFloat16;

// The dispatcher calls this backend if any argument is on a GPU.
void check_on_cuda(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda(), op, ": x must be on the device of the others");
}

// One call of a layer.
template <typename S>
class Layer {
 public:
  template <typename DirectionArguments>
  explicit Layer(const std::vector<DirectionArguments>& directions)
      : op_(directions[0].common.op),
        tf32_(directions[0].common.tf32),
        r_(checked(directions)),
        device_(op_, common().device().index) {
    // One launch runs both directions with the sizes of the first.
    for (const CheckedRnnArguments<S>& r : r_) {
      STD_TORCH_CHECK(r.sizes().hidden == sizes().hidden && r.sizes().output == sizes().output, op_,
                      ": both directions must have the same sizes, got H = ", sizes().hidden, " and ", r.sizes().hidden,
                      ", P = ", sizes().output, " and ", r.sizes().output);
    }
    // Kernels use int for each of these.
    for (int64_t size : {sizes().steps, sizes().batch, sizes().hidden}) {
      STD_TORCH_CHECK(size < int64_t{1} << 31, op_, ": T, B and H must be below 2^31 on cuda, got ", size);
    }
  }

  RnnForwardResults forward(const std::vector<DirectionForward>& given, bool needs_autograd) {
    const RecurrenceSizes& s = sizes();
    std::vector<Input<S>> biases;  // b_ih and b_hh of each direction
    for (int d = 0; d < directions(); ++d) {
      biases.push_back(r_[d].input("b_ih", given[d].b_ih, {r_[d].gates()}));
      biases.push_back(r_[d].input("b_hh", given[d].b_hh, {r_[d].gates()}));
    }
    if (common().packed()) offsets_ = offsets_on_device();
    RnnForwardResults out = {common().empty_rows(directions() * s.output), new_states(s.output), {}, {}};
    if (s.mode == Mode::kLstm) out.c_n = new_states(s.hidden);
    if (saved_blocks(s.mode, false) > 0)
      out.saved = new_matrix(needs_autograd ? directions() * rows() : 0, saved_width());

    cuda::RecurrenceForward<S> call = {shape(), {}, nullptr};
    std::vector<Tensor> gates_x;
    for (int d = 0; d < directions(); ++d) {
      const CheckedRnnArguments<S>& r = r_[d];
      const Input<S>&b_ih = biases[2 * d], &b_hh = biases[2 * d + 1];
      if (nothing_to_do()) continue;
      const Tensor& z = gates_x.emplace_back(new_matrix(rows(), r.gates()));
      const Tensor w_ih = transposed(matrix(r.w_ih_tensor(), r.gates(), s.input));
      b_ih.tensor() ? multiply_add(z, x(), w_ih, *b_ih.tensor()) : multiply(z, x(), w_ih);
      cuda::ForwardDirection<S>& to = call.direction[d];
      to.reverse = r.sizes().reverse;
      to.gates_x = data<S>(z);
      to.w_hh = r.w_hh();
      to.w_hr = r.w_hr();
      to.b_hh = b_hh.get();
      to.h0 = r.h0();
      to.c0 = r.c0();
      to.y = mutable_data<S>(out.y) + d * s.output;
      to.y_stride = directions() * s.output;
      to.h_n = state_of(out.h_n, d, s.output);
      to.c_n = out.c_n ? state_of(*out.c_n, d, s.hidden) : nullptr;
      to.saved = needs_autograd && out.saved ? mutable_data<S>(*out.saved) + d * rows() * saved_width() : nullptr;
    }
    if (nothing_to_do()) {
      for (int d = 0; d < directions(); ++d) {
        pass_state(r_[d].h0_tensor(), out.h_n, d, s.output);
        if (out.c_n) pass_state(r_[d].c0_tensor(), *out.c_n, d, s.hidden);
      }
      zero(out.y);
      return out;
    }
    launch(cuda::Pass::kForward, call, cuda::recurrence_forward<S>);
    return out;
  }

  std::vector<RnnBackwardResults> backward(const std::vector<DirectionBackward>& given, const OptionalTensor& grad_y,
                                           const Tensor& y, const OptionalTensor& saved) {
    const RecurrenceSizes& s = sizes();
    const Input<S> y_in = common().rows_input("y", y, directions() * s.output);
    const Input<S> grad_y_in = common().rows_input("grad_y", grad_y, directions() * s.output);
    if (saved.has_value() && saved_width() > 0) common().check_saved(*saved);
    const Input<S> saved_in = common().input("saved", saved, {directions() * rows(), saved_width()});
    std::vector<Input<S>> states;  // grad_h_n and grad_c_n of each direction
    for (int d = 0; d < directions(); ++d) {
      states.push_back(r_[d].state_input("grad_h_n", given[d].grad_h_n, s.output));
      states.push_back(r_[d].state_input("grad_c_n", given[d].grad_c_n, s.hidden));
    }
    if (common().packed()) offsets_ = offsets_on_device();
    const bool need_dh0 = given[0].common.need_dh0 && common().h0() != nullptr;
    const bool need_dc0 = given[0].common.need_dc0 && common().c0() != nullptr;
    const Tensor dx = given[0].common.need_dx ? common().empty_rows(s.input) : nothing();
    const Tensor dh0 = need_dh0 ? new_states(s.output) : nothing();
    const Tensor dc0 = need_dc0 ? new_states(s.hidden) : nothing();

    cuda::RecurrenceBackward<S> call = {shape(), {}, nullptr};
    std::vector<Tensor> dz, dh;
    std::vector<RnnBackwardResults> out;
    for (int d = 0; d < directions(); ++d) {
      const CheckedRnnArguments<S>& r = r_[d];
      const RnnBackwardArguments& need = given[d].common;
      const Input<S>&grad_h_n = states[2 * d], &grad_c_n = states[2 * d + 1];
      const auto output_for = [&](bool wanted, std::initializer_list<int64_t> shape) {
        return r.output(wanted, shape).tensor();
      };
      out.push_back({dx, dh0, dc0, output_for(need.need_dw_ih, {r.gates(), s.input}),
                     output_for(need.need_dw_hh, {r.gates(), s.output}), output_for(need.need_db_ih, {r.gates()}),
                     output_for(need.need_db_hh, {r.gates()}),
                     output_for(need.need_dw_hr && s.projected(), {s.output, s.hidden})});
      if (nothing_to_do()) {
        // Without steps, the last state is the first one: pass its gradient on. All other gradients are zero.
        if (need_dh0) pass_state(grad_h_n.tensor(), dh0, d, s.output);
        if (need_dc0) pass_state(grad_c_n.tensor(), dc0, d, s.hidden);
        for (const Tensor& t : {dx, out[d].dw_ih, out[d].dw_hh, out[d].db_ih, out[d].db_hh, out[d].dw_hr}) zero(t);
        continue;
      }
      dz.push_back(new_matrix(rows(), blocks()));
      if (s.projected()) dh.push_back(new_matrix(rows(), s.output));
      cuda::BackwardDirection<S>& to = call.direction[d];
      to.reverse = r.sizes().reverse;
      to.grad_y = grad_y.has_value() ? grad_y_in.get() + d * s.output : nullptr;
      to.grad_y_stride = directions() * s.output;
      to.grad_h_n = grad_h_n.get();
      to.grad_c_n = grad_c_n.get();
      to.w_hh = r.w_hh();
      to.w_hr = r.w_hr();
      to.h0 = r.h0();
      to.c0 = r.c0();
      to.y = y_in.get() + d * s.output;
      to.y_stride = directions() * s.output;
      to.saved = saved_width() > 0 ? saved_in.get() + d * rows() * saved_width() : nullptr;
      to.dz = mutable_data<S>(dz[d]);
      to.dh = s.projected() ? mutable_data<S>(dh[d]) : nullptr;
      to.dh0 = need_dh0 ? state_of(dh0, d, s.output) : nullptr;
      to.dc0 = need_dc0 ? state_of(dc0, d, s.hidden) : nullptr;
    }
    if (nothing_to_do()) return out;
    launch(cuda::Pass::kBackward, call, cuda::recurrence_backward<S>);

    const Tensor all_y = matrix(*y_in.tensor(), rows(), directions() * s.output);
    OptionalTensor x_in;
    for (int d = 0; d < directions(); ++d) {
      const RnnBackwardArguments& need = given[d].common;
      const SequenceProducts<S> products(op_, r_[d], shape(), device_.stream());
      if (need.need_dx) products.input_gradient(dz[d], matrix(dx, rows(), s.input), d > 0);
      if (need.need_dw_ih) {
        if (!x_in) x_in = products.without_padding(x());
        products.input_weight_gradient(dz[d], *x_in, out[d].dw_ih);
      }
      if (need.need_dw_hh)
        products.state_weight_gradient(dz[d], columns_of(all_y, d * s.output, s.output), out[d].dw_hh);
      if (need.need_dw_hr && s.projected()) {
        // The last saved block is the output before its projection.
        const Tensor m = matrix(*saved_in.tensor(), rows(), s.hidden, {saved_width(), 1},
                                (d * rows() + 1) * saved_width() - s.hidden);
        multiply(out[d].dw_hr, transposed(dh[d]), products.without_padding(m));
      }
      if (need.need_db_ih || need.need_db_hh) products.bias_gradients(dz[d], need, out[d]);
    }
    return out;
  }

 private:
  const CheckedRnnArguments<S>& common() const { return r_[0]; }
  const RecurrenceSizes& sizes() const { return r_[0].sizes(); }
  int64_t rows() const { return r_[0].rows(); }
  int directions() const { return static_cast<int>(r_.size()); }
  bool nothing_to_do() const { return rows() == 0 || sizes().hidden == 0; }
  int64_t blocks() const { return blocks_of(sizes().mode) * sizes().hidden; }
  int64_t saved_width() const { return saved_blocks(sizes().mode, sizes().projected()) * sizes().hidden; }
  Tensor x() const { return matrix(common().x_tensor(), rows(), sizes().input); }

  // A result that is not wanted. Each is a tensor of its own: an op must not return the same tensor twice.
  Tensor nothing() const { return llm_ext::empty({0}, kScalarType<S>, common().device()); }
  Tensor new_matrix(int64_t rows, int64_t columns) const {
    return llm_ext::empty({rows, columns}, kScalarType<S>, common().device());
  }
  // The states of both directions, [2, B, *]; the state of one, in the shape of its initial state.
  Tensor new_states(int64_t width) const {
    if (directions() == 1) return common().state_output(true, width).tensor();
    return llm_ext::empty({directions(), sizes().batch, width}, kScalarType<S>, common().device());
  }
  S* state_of(const Tensor& states, int d, int64_t width) const {
    return mutable_data<S>(states) + d * sizes().batch * width;
  }
  void pass_state(const OptionalTensor& from, const Tensor& states, int d, int64_t width) const {
    const int64_t B = sizes().batch;
    const Tensor to = matrix(states, B, width, {width, 1}, d * B * width);
    from ? copy(to, matrix(*from, B, width)) : zero(to);
  }

  // ---- the launch

  cuda::RecurrenceShape shape() const {
    const RecurrenceSizes& s = sizes();
    return {s.mode,
            s.steps,
            s.batch,
            s.hidden,
            s.output,
            directions(),
            common().lengths(),
            offsets_ ? data<int64_t>(*offsets_) : nullptr};
  }
  cuda::Problem problem(cuda::Pass pass) const {
    const RecurrenceSizes& s = sizes();
    return {s.mode, pass, kType<S>, s.steps, s.batch, s.hidden, s.output, directions(), tf32_};
  }
  template <typename Call>
  void launch(cuda::Pass pass, Call& call, int (*run)(const Call&, const cuda::Plan&, void*)) const {
    const cuda::Problem p = problem(pass);
    const auto with = [&](const cuda::Plan& plan) {
      const int64_t bytes = cuda::workspace_bytes(p, plan);
      OptionalTensor workspace;
      if (bytes > 0) workspace = llm_ext::empty({bytes}, ScalarType::Byte, common().device());
      call.workspace = workspace ? workspace->data_ptr() : nullptr;
      return device_.launch(plan.route == cuda::Route::kGrid, [&] { return run(call, plan, device_.stream()); });
    };
    int error = with(cuda::make_plan(p, device_.facts()));
    // The generic kernel needs the fewest resources.
    if (asks_too_much(error)) error = with(cuda::make_plan(p, device_.facts(), cuda::Route::kGeneric));
    check_queued(op_, error);
  }

  // Copies from pinned memory, without waiting; torch's allocator keeps the memory until the copy is done.
  Tensor offsets_on_device() const {
    // A replay of the graph would read the pinned memory again, which is reused by then.
    STD_TORCH_CHECK(cuda::capture_of(device_.stream()) == 0, op_,
                    ": batch_sizes cannot be captured in a CUDA graph; give padded sequences with lengths");
    const std::vector<int64_t> offsets = common().row_offsets();
    const int64_t sizes[] = {static_cast<int64_t>(offsets.size())};
    const Tensor pinned = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes, 1), ScalarType::Long,
                                               std::nullopt, std::nullopt, true);
    std::copy(offsets.begin(), offsets.end(), mutable_data<int64_t>(pinned));
    Tensor copy = llm_ext::empty({sizes[0]}, ScalarType::Long, common().device());
    torch::stable::copy_(copy, pinned, true);
    return copy;
  }

  template <typename DirectionArguments>
  static std::deque<CheckedRnnArguments<S>> checked(const std::vector<DirectionArguments>& directions) {
    check_on_cuda(directions[0].common.op, *directions[0].common.x);
    std::deque<CheckedRnnArguments<S>> result;
    for (const DirectionArguments& d : directions) result.emplace_back(d.common);
    return result;
  }

  // In this order: the device is entered after the arguments were checked.
  const char* op_;
  const bool tf32_;
  const std::deque<CheckedRnnArguments<S>> r_;
  const CudaDevice device_;
  OptionalTensor offsets_;  // first row of each step of a packed sequence, on the device; set after all checks
};

}  // namespace

RnnForwardResults forward_layer(const std::vector<DirectionForward>& directions, bool needs_autograd) {
  const RnnArguments& first = directions[0].common;
  return with_type<float, double, BFloat16, Float16>(*first.x, first.op, "x", [&](auto type) {
    return Layer<decltype(type)>(directions).forward(directions, needs_autograd);
  });
}

std::vector<RnnBackwardResults> backward_layer(const std::vector<DirectionBackward>& directions,
                                               const OptionalTensor& grad_y, const Tensor& y,
                                               const OptionalTensor& saved) {
  const RnnArguments& first = directions[0].common;
  return with_type<float, double, BFloat16, Float16>(*first.x, first.op, "x", [&](auto type) {
    return Layer<decltype(type)>(directions).backward(directions, grad_y, y, saved);
  });
}

}  // namespace llm_ext
