// The recurrence on NVIDIA GPUs: check, allocate, multiply, launch. One kernel launch of csrc/cuda/rnn runs the loop
// over time for one or both directions of a layer; products over the whole sequence are torch's. All work is queued on
// torch's current stream: nothing here waits for the device.
#include <algorithm>
#include <deque>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/rnn/launchers.h"
#include "cuda/rnn/shift_rows.h"
#include "torch/ops/cuda_device.h"
#include "torch/ops/cuda_matrix.h"
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

// ---- a layer

// The arguments of one direction.
struct ForwardArguments {
  RnnArguments common;
  OptionalTensor b_ih, b_hh;
};
struct BackwardArguments {
  RnnBackwardArguments common;  // without the gradients of the states
  OptionalTensor grad_h_n, grad_c_n;
};

// One or two directions of a layer; the second runs in reverse. Both share the rows of y [N, 2 P] and of its gradient.
// Their states and saved activations are adjacent, [2, ...].
template <typename S>
class Layer {
 public:
  template <typename DirectionArguments>
  explicit Layer(const std::vector<DirectionArguments>& directions)
      : op_(directions[0].common.op),
        tf32_(directions[0].common.tf32),
        r_(checked(directions)),
        device_(op_, common().device().index) {
    // Kernels use int for each of these.
    for (int64_t size : {sizes().steps, sizes().batch, sizes().hidden}) {
      STD_TORCH_CHECK(size < int64_t{1} << 31, op_, ": T, B and H must be below 2^31 on cuda, got ", size);
    }
    if (common().packed()) offsets_ = offsets_on_device();
  }

  RnnForwardResults forward(const std::vector<ForwardArguments>& given, bool needs_autograd) const {
    const RecurrenceSizes& s = sizes();
    RnnForwardResults out = {common().empty_rows(directions() * s.output), new_states(s.output), {}, {}};
    if (s.mode == Mode::kLstm) out.c_n = new_states(s.hidden);
    if (saved_blocks(s.mode, false) > 0)
      out.saved = new_matrix(needs_autograd ? directions() * rows() : 0, saved_width());

    cuda::RecurrenceForward<S> call = {shape(), {}, nullptr};
    std::deque<Input<S>> biases;
    std::vector<Tensor> gates_x;
    for (int d = 0; d < directions(); ++d) {
      const CheckedRnnArguments<S>& r = r_[d];
      const Input<S>& b_ih = biases.emplace_back(r.input("b_ih", given[d].b_ih, {r.gates()}));
      const Input<S>& b_hh = biases.emplace_back(r.input("b_hh", given[d].b_hh, {r.gates()}));
      if (nothing_to_do()) continue;
      const Tensor& z = gates_x.emplace_back(new_matrix(rows(), r.gates()));
      const Tensor w_ih = transposed(w_ih_of(r));
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

  // Returns the gradients per direction; dx, dh0 and dc0 are those of all directions, repeated in each element.
  std::vector<RnnBackwardResults> backward(const std::vector<BackwardArguments>& given, const OptionalTensor& grad_y,
                                           const Tensor& y, const OptionalTensor& saved) const {
    const RecurrenceSizes& s = sizes();
    const Tensor y_in = common().dense_rows("y", y, directions() * s.output);
    OptionalTensor grad_y_in;
    if (grad_y.has_value()) grad_y_in = common().dense_rows("grad_y", *grad_y, directions() * s.output);
    if (saved.has_value() && saved_width() > 0) common().check_saved(*saved);
    const Input<S> saved_in = common().input("saved", saved, {directions() * rows(), saved_width()});
    const bool need_dh0 = given[0].common.need_dh0 && common().h0() != nullptr;
    const bool need_dc0 = given[0].common.need_dc0 && common().c0() != nullptr;
    const Tensor dx = given[0].common.need_dx ? common().empty_rows(s.input) : nothing();
    const Tensor dh0 = need_dh0 ? new_states(s.output) : nothing();
    const Tensor dc0 = need_dc0 ? new_states(s.hidden) : nothing();

    cuda::RecurrenceBackward<S> call = {shape(), {}, nullptr};
    std::deque<Input<S>> states;
    std::vector<Tensor> dz, dh;
    std::vector<RnnBackwardResults> out;
    for (int d = 0; d < directions(); ++d) {
      const CheckedRnnArguments<S>& r = r_[d];
      const RnnBackwardArguments& need = given[d].common;
      const Input<S>& grad_h_n = states.emplace_back(r.state_input("grad_h_n", given[d].grad_h_n, s.output));
      const Input<S>& grad_c_n = states.emplace_back(r.state_input("grad_c_n", given[d].grad_c_n, s.hidden));
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
      to.grad_y = grad_y_in ? data<S>(*grad_y_in) + d * s.output : nullptr;
      to.grad_y_stride = directions() * s.output;
      to.grad_h_n = grad_h_n.get();
      to.grad_c_n = grad_c_n.get();
      to.w_hh = r.w_hh();
      to.w_hr = r.w_hr();
      to.h0 = r.h0();
      to.c0 = r.c0();
      to.y = data<S>(y_in) + d * s.output;
      to.y_stride = directions() * s.output;
      to.saved = saved_width() > 0 ? saved_in.get() + d * rows() * saved_width() : nullptr;
      to.dz = mutable_data<S>(dz[d]);
      to.dh = s.projected() ? mutable_data<S>(dh[d]) : nullptr;
      to.dh0 = need_dh0 ? state_of(dh0, d, s.output) : nullptr;
      to.dc0 = need_dc0 ? state_of(dc0, d, s.hidden) : nullptr;
    }
    if (nothing_to_do()) return out;
    launch(cuda::Pass::kBackward, call, cuda::recurrence_backward<S>);

    const Tensor all_y = matrix(y_in, rows(), directions() * s.output);
    OptionalTensor x_in;
    for (int d = 0; d < directions(); ++d) {
      const RnnBackwardArguments& need = given[d].common;
      if (need.need_dx) input_gradient(r_[d], dz[d], matrix(dx, rows(), s.input), d > 0);
      if (need.need_dw_ih) {
        if (!x_in) x_in = without_padding(x());
        for (const RowRange& p : input_ranges()) {
          multiply(rows_of(out[d].dw_ih, p.row, p.rows), transposed(columns_of(dz[d], p.column, p.rows)), *x_in);
        }
      }
      if (need.need_dw_hh)
        state_weight_gradient(r_[d], state_columns(dz[d]), columns_of(all_y, d * s.output, s.output), out[d].dw_hh);
      if (need.need_dw_hr && s.projected()) {
        // The last saved block is the output before its projection.
        const Tensor m = matrix(*saved_in.tensor(), rows(), s.hidden, {saved_width(), 1},
                                (d * rows() + 1) * saved_width() - s.hidden);
        multiply(out[d].dw_hr, transposed(dh[d]), without_padding(m));
      }
      if (need.need_db_ih || need.need_db_hh) bias_gradients(dz[d], need, out[d]);
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
  Tensor w_ih_of(const CheckedRnnArguments<S>& r) const { return matrix(r.w_ih_tensor(), r.gates(), sizes().input); }

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
      return run(call, plan, device_.stream());
    };
    int error = with(cuda::make_plan(p, device_.facts()));
    // The generic kernel needs the fewest resources.
    if (is_too_large(error)) error = with(cuda::make_plan(p, device_.facts(), cuda::Route::kGeneric));
    check_queued(op_, error);
  }

  // Copies from pinned memory, without waiting; torch's allocator keeps the memory until the copy is done.
  Tensor offsets_on_device() const {
    // A replay of the graph would read the pinned memory again, which is reused by then.
    STD_TORCH_CHECK(!cuda::is_capturing(device_.stream()), op_,
                    ": batch_sizes cannot be captured in a CUDA graph; give padded sequences with lengths");
    const std::vector<int64_t>& offsets = common().offsets();
    const int64_t sizes[] = {static_cast<int64_t>(offsets.size())};
    const Tensor pinned = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes, 1), ScalarType::Long,
                                               std::nullopt, std::nullopt, true);
    std::copy(offsets.begin(), offsets.end(), mutable_data<int64_t>(pinned));
    Tensor copy = llm_ext::empty({sizes[0]}, ScalarType::Long, common().device());
    torch::stable::copy_(copy, pinned, true);
    return copy;
  }

  // ---- products over the whole sequence

  // Columns of dz that are the gradients of rows of W and b_ih. The GRU's blocks n r z belong to the rows r z n.
  struct RowRange {
    int64_t column, row, rows;
  };
  std::vector<RowRange> input_ranges() const {
    const int64_t H = sizes().hidden;
    if (sizes().mode == Mode::kGru) return {{H, 0, 2 * H}, {0, 2 * H, H}};
    return {{0, 0, blocks()}};
  }
  // The columns of dz for U and b_hh: the last blocks, in the order of their rows.
  Tensor state_columns(const Tensor& dz) const {
    const int64_t gates = common().gates();
    return columns_of(dz, blocks() - gates, gates);
  }

  // Zeroes padding, which may hold NaN: its gradients are 0, and 0 times NaN is NaN.
  Tensor without_padding(const Tensor& m) const {
    if (common().lengths() == nullptr) return m;
    return shifted(m, 0, nullptr);
  }
  Tensor shifted(const Tensor& m, int shift, const S* first) const {
    constexpr int64_t kBytes = sizeof(S);
    const cuda::RecurrenceShape s = shape();
    Tensor to = new_matrix(m.size(0), m.size(1));
    if (m.numel() == 0) return to;
    const cuda::RowShift call = {
        s.steps, s.batch,      s.lengths, s.row_offsets, shift, m.size(1) * kBytes, m.data_ptr(), m.stride(0) * kBytes,
        first,   to.data_ptr()};
    check_queued(op_, cuda::shift_rows(call, device_.stream()));
    return to;
  }

  // dx = dz W, or dx += dz W.
  void input_gradient(const CheckedRnnArguments<S>& r, const Tensor& dz, const Tensor& dx, bool add) const {
    Tensor w_ih = w_ih_of(r);
    if (sizes().mode == Mode::kGru) {
      // W in the order of dz: one product is faster than two.
      const Tensor ordered = new_matrix(w_ih.size(0), w_ih.size(1));
      for (const RowRange& p : input_ranges()) copy(rows_of(ordered, p.column, p.rows), rows_of(w_ih, p.row, p.rows));
      w_ih = ordered;
    }
    const Tensor dz_input = columns_of(dz, 0, w_ih.size(0));
    add ? multiply_add(dx, dz_input, w_ih, dx) : multiply(dx, dz_input, w_ih);
  }

  // dU = dzᵀ h, where h is the state before each step.
  void state_weight_gradient(const CheckedRnnArguments<S>& r, const Tensor& dz, const Tensor& y,
                             const Tensor& dw_hh) const {
    const RecurrenceSizes& s = r.sizes();
    const bool ends_vary = r.packed() || r.lengths() != nullptr;
    if (ends_vary) {
      multiply(dw_hh, transposed(dz), shifted(y, s.reverse ? 1 : -1, r.h0()));
      return;
    }
    // All steps but the first find their states in y, one step away.
    const int64_t B = s.batch, rest = rows() - B;
    const Tensor later = rows_of(dz, s.reverse ? 0 : B, rest), states = rows_of(y, s.reverse ? B : 0, rest);
    const Tensor first = rows_of(dz, s.reverse ? rest : 0, B);
    multiply(dw_hh, transposed(later), states);
    if (r.h0() != nullptr) multiply_add(dw_hh, transposed(first), matrix(*r.h0_tensor(), B, s.output), dw_hh);
  }

  void bias_gradients(const Tensor& dz, const RnnBackwardArguments& need, const RnnBackwardResults& out) const {
    const int64_t dimension = 0;
    const Tensor sums = torch::stable::sum(dz, torch::headeronly::IntHeaderOnlyArrayRef(&dimension, 1));
    const Tensor row = matrix(sums, 1, blocks());
    const int64_t gates = common().gates();
    if (need.need_db_hh) copy(matrix(out.db_hh, 1, gates), state_columns(row));
    if (!need.need_db_ih) return;
    for (const RowRange& p : input_ranges()) {
      copy(columns_of(matrix(out.db_ih, 1, gates), p.row, p.rows), columns_of(row, p.column, p.rows));
    }
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
  OptionalTensor offsets_;  // first row of each step, on the device
};

// Directions as ops of several take them: weights one direction after the other, states [2, B, *].
class Directions {
 public:
  Directions(const char* op, const std::string& mode, const Tensor& x, const OptionalTensor& h0,
             const OptionalTensor& c0, const std::vector<Tensor>& weights, bool bias, int count)
      : op_(op), mode_(mode_named(op, mode)), x_(x), count_(count), bias_(bias) {
    each_ = static_cast<int>(weights.size()) / count;
    projected_ = each_ == (bias ? 5 : 3);
    STD_TORCH_CHECK(static_cast<int>(weights.size()) == each_ * count && each_ - projected_ == (bias ? 4 : 2) &&
                        (!projected_ || mode_ == Mode::kLstm),
                    op, ": weights must be w_ih, w_hh, the biases and w_hr of each direction, got ", weights.size());
    check_states(op, mode_ == Mode::kLstm ? h0 : kNone, c0);
    for (const Tensor& w : weights) weights_.emplace_back(w);
    for (int d = 0; d < count; ++d) {
      h0_.push_back(state_of_direction("h0", h0, d));
      c0_.push_back(state_of_direction("c0", c0, d));
    }
  }

  // The state [B, *] of a direction.
  OptionalTensor state_of_direction(const char* name, const OptionalTensor& state, int d) const {
    if (!state.has_value()) return std::nullopt;
    STD_TORCH_CHECK(state->dim() == 3 && state->size(0) == count_, op_, ": ", name, " must be [", count_,
                    ", B, *], got ", shape_text(*state));
    return matrix(*state, state->size(1), state->size(2), {state->stride(1), state->stride(2)}, d * state->stride(0));
  }

  RnnArguments arguments(int d, const OptionalTensor& batch_sizes, const OptionalTensor& lengths, bool tf32) const {
    const OptionalTensor* own = &weights_[d * each_];
    RnnArguments a;
    a.op = op_;
    a.mode = mode_;
    a.x = &x_;
    a.h0 = &h0_[d];
    a.c0 = &c0_[d];
    a.w_ih = &*own[0];
    a.w_hh = &*own[1];
    a.w_hr = projected_ ? &own[each_ - 1] : &kNone;
    a.batch_sizes = &batch_sizes;
    a.lengths = &lengths;
    a.reverse = d == 1;
    a.tf32 = tf32;
    return a;
  }
  ForwardArguments forward(int d, const OptionalTensor& batch_sizes, const OptionalTensor& lengths, bool tf32) const {
    const OptionalTensor* own = &weights_[d * each_];
    return {arguments(d, batch_sizes, lengths, tf32), bias_ ? own[2] : kNone, bias_ ? own[3] : kNone};
  }
  // Appends the gradients of a direction's weights.
  void append_gradients(const RnnBackwardResults& r, std::vector<Tensor>& to) const {
    to.insert(to.end(), {r.dw_ih, r.dw_hh});
    if (bias_) to.insert(to.end(), {r.db_ih, r.db_hh});
    if (projected_) to.push_back(r.dw_hr);
  }

 private:
  const char* op_;
  const Mode mode_;
  const Tensor& x_;
  const int count_;
  const bool bias_;
  int each_;  // tensors per direction
  bool projected_;
  std::vector<OptionalTensor> weights_, h0_, c0_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> bidirectional_forward(const std::string& mode, const Tensor& x,
                                                                 const OptionalTensor& h0, const OptionalTensor& c0,
                                                                 const std::vector<Tensor>& weights, bool bias,
                                                                 const OptionalTensor& batch_sizes,
                                                                 const OptionalTensor& lengths, bool tf32,
                                                                 bool needs_autograd) {
  const Directions both("bidirectional_forward", mode, x, h0, c0, weights, bias, 2);
  return with_type<float, double, BFloat16, Float16>(x, "bidirectional_forward", "x", [&](auto type) {
    const std::vector<ForwardArguments> given = {both.forward(0, batch_sizes, lengths, tf32),
                                                 both.forward(1, batch_sizes, lengths, tf32)};
    RnnForwardResults r = Layer<decltype(type)>(given).forward(given, needs_autograd);
    const auto or_nothing = [&](const OptionalTensor& t) {
      return t ? *t : empty({0}, kScalarType<decltype(type)>, device_of(x));
    };
    return std::tuple<Tensor, Tensor, Tensor, Tensor>{r.y, r.h_n, or_nothing(r.c_n), or_nothing(r.saved)};
  });
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> bidirectional_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
    const std::string& mode, const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
    const std::vector<Tensor>& weights, bool bias, const Tensor& y, const Tensor& saved,
    const OptionalTensor& batch_sizes, const OptionalTensor& lengths, bool tf32, bool need_dx, bool need_dh0,
    bool need_dc0, bool need_dweights) {
  constexpr const char* kOp = "bidirectional_backward";
  const Directions both(kOp, mode, x, h0, c0, weights, bias, 2);
  return with_type<float, double, BFloat16, Float16>(x, kOp, "x", [&](auto type) {
    std::vector<BackwardArguments> given;
    for (int d = 0; d < 2; ++d) {
      RnnBackwardArguments a;
      static_cast<RnnArguments&>(a) = both.arguments(d, batch_sizes, lengths, tf32);
      a.need_dx = need_dx;
      a.need_dh0 = need_dh0;
      a.need_dc0 = need_dc0;
      a.need_dw_ih = a.need_dw_hh = a.need_db_ih = a.need_db_hh = a.need_dw_hr = need_dweights;
      given.push_back(
          {a, both.state_of_direction("grad_h_n", grad_h_n, d), both.state_of_direction("grad_c_n", grad_c_n, d)});
    }
    const OptionalTensor saved_rows =
        saved_blocks(given[0].common.mode, false) > 0 ? OptionalTensor(saved) : std::nullopt;
    const std::vector<RnnBackwardResults> r = Layer<decltype(type)>(given).backward(given, grad_y, y, saved_rows);
    std::vector<Tensor> dweights;
    for (const RnnBackwardResults& of : r) both.append_gradients(of, dweights);
    return std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>{r[0].dx, r[0].dh0, r[0].dc0, std::move(dweights)};
  });
}

// Layer by layer: on a GPU each has all of the device.
std::tuple<Tensor, Tensor, Tensor> multilayer_rnn_forward(const std::string& mode, const Tensor& x,
                                                          const OptionalTensor& h0, const OptionalTensor& c0,
                                                          const std::vector<Tensor>& weights, bool bias,
                                                          bool bidirectional,
                                                          const std::vector<Tensor>& input_projections,
                                                          const OptionalTensor& batch_sizes, bool tf32) {
  constexpr const char* kOp = "multilayer_rnn_forward";
  STD_TORCH_CHECK(input_projections.empty() && !batch_sizes.has_value(), kOp,
                  ": input_projections and batch_sizes are for cpu only");
  const int directions = bidirectional ? 2 : 1, each = bias ? 4 : 2;
  const int rows = static_cast<int>(weights.size()) / each, layers = rows / directions;
  STD_TORCH_CHECK(x.dim() == 3, kOp, ": x must be [T, B, I], got ", shape_text(x));
  STD_TORCH_CHECK(layers > 0 && static_cast<int>(weights.size()) == layers * directions * each, kOp,
                  ": weights must be ", each, " tensors for each of the ", directions,
                  " directions of each layer, got ", weights.size());
  for (const OptionalTensor& state : {h0, c0}) {
    STD_TORCH_CHECK(!state.has_value() || (state->dim() == 3 && state->size(0) == rows), kOp, ": states must be [",
                    rows, ", B, H]");
  }
  return with_type<float, double, BFloat16, Float16>(x, kOp, "x", [&](auto type) {
    using S = decltype(type);
    const int64_t B = x.size(1), H = weights[1].dim() == 2 ? weights[1].size(1) : 0;
    const bool lstm = mode == "LSTM";
    const Tensor h_n = empty({rows, B, H}, kScalarType<S>, device_of(x));
    const Tensor c_n = empty({lstm ? rows : 0, B, H}, kScalarType<S>, device_of(x));
    Tensor y = x;
    for (int layer = 0; layer < layers; ++layer) {
      const int row = layer * directions;
      const auto of_layer = [&](OptionalTensor state) {
        return state ? OptionalTensor(torch::stable::narrow(*state, 0, row, directions)) : std::nullopt;
      };
      const OptionalTensor h = of_layer(h0), c = of_layer(c0);
      const std::vector<Tensor> own(weights.begin() + row * each, weights.begin() + (row + directions) * each);
      const Directions all(kOp, mode, y, h, c, own, bias, directions);
      std::vector<ForwardArguments> given;
      for (int d = 0; d < directions; ++d) given.push_back(all.forward(d, kNone, kNone, tf32));
      const RnnForwardResults r = Layer<S>(given).forward(given, false);
      const auto place = [&](const Tensor& from, const Tensor& to) {
        copy(matrix(to, directions * B, H, {H, 1}, row * B * H), matrix(from, directions * B, H));
      };
      place(r.h_n, h_n);
      if (lstm) place(*r.c_n, c_n);
      y = r.y;
    }
    return std::tuple<Tensor, Tensor, Tensor>{y, h_n, c_n};
  });
}

struct Cuda {
  static RnnForwardResults forward(const RnnForwardArguments& a) {
    return with_type<float, double, BFloat16, Float16>(*a.x, a.op, "x", [&](auto type) {
      const std::vector<ForwardArguments> one = {{a, *a.b_ih, *a.b_hh}};
      return Layer<decltype(type)>(one).forward(one, a.needs_autograd);
    });
  }

  static RnnBackwardResults backward(const RnnBackwardArguments& a) {
    return with_type<float, double, BFloat16, Float16>(*a.x, a.op, "x", [&](auto type) {
      const std::vector<BackwardArguments> one = {{a, *a.grad_h_n, *a.grad_c_n}};
      const OptionalTensor saved = a.saved != nullptr ? OptionalTensor(*a.saved) : std::nullopt;
      return Layer<decltype(type)>(one).backward(one, *a.grad_y, *a.y, saved)[0];
    });
  }
};

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CUDA, m) {
  llm_ext::register_rnn_ops<llm_ext::Cuda>(m);
  m.impl("bidirectional_forward", TORCH_BOX(&llm_ext::bidirectional_forward));
  m.impl("bidirectional_backward", TORCH_BOX(&llm_ext::bidirectional_backward));
  m.impl("multilayer_rnn_forward", TORCH_BOX(&llm_ext::multilayer_rnn_forward));
}
