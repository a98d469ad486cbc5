// The ops of the recurrence, as every backend has them: what their arguments are, checked, and what they return. A
// backend is a struct with two functions, forward and backward.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "params/attention.h"
#include "params/linear.h"
#include "params/pooling.h"
#include "params/rnn.h"
#include "torch/tensor_args.h"
#include "torch/stable.h"

namespace llm_ext {

// The mode of that name, as torch.nn.RNNBase.mode spells it.
inline Mode mode_named(const char* op, const std::string& name) {
  if (name == "RNN_TANH") return Mode::kRnnTanh;
  if (name == "RNN_RELU") return Mode::kRnnRelu;
  if (name == "RNN_SIGMOID") return Mode::kRnnSigmoid;
  if (name == "GRU") return Mode::kGru;
  if (name == "LSTM") return Mode::kLstm;
  STD_TORCH_CHECK(false, op, ": mode must be RNN_TANH, RNN_RELU, RNN_SIGMOID, GRU or LSTM, got ", name);
}

// The mode of an Elman RNN with that nonlinearity.
inline Mode rnn_mode(const char* op, const std::string& nonlinearity) {
  if (nonlinearity == "tanh") return Mode::kRnnTanh;
  if (nonlinearity == "relu") return Mode::kRnnRelu;
  if (nonlinearity == "sigmoid") return Mode::kRnnSigmoid;
  STD_TORCH_CHECK(false, op, ": nonlinearity must be tanh, relu or sigmoid, got ", nonlinearity);
}

// First row of each step, and the end, T + 1 numbers: of `rows` packed rows.
inline std::vector<int64_t> offsets_of(const char* op, int64_t rows, const Tensor& batch_sizes) {
  STD_TORCH_CHECK(batch_sizes.dim() == 1, op, ": batch_sizes must be [T], got ", shape_text(batch_sizes));
  const int64_t steps = batch_sizes.size(0);
  const Input<int64_t> sizes(batch_sizes, op, "batch_sizes", {steps}, ScalarType::Long);
  std::vector<int64_t> offsets(steps + 1, 0);
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t size = sizes.get()[t];
    STD_TORCH_CHECK(size >= 1 && (t == 0 || size <= sizes.get()[t - 1]), op,
                    ": batch_sizes must be positive and never rise, got ", size, " at step ", t);
    offsets[t + 1] = offsets[t] + size;
  }
  STD_TORCH_CHECK(offsets[steps] == rows, op, ": batch_sizes must sum to the rows of x, ", rows, ", got ",
                  offsets[steps]);
  return offsets;
}

// The same of x, packed or not.
inline std::vector<int64_t> row_offsets(const char* op, const Tensor& x, const OptionalTensor& batch_sizes) {
  if (batch_sizes.has_value()) {
    STD_TORCH_CHECK(x.dim() == 2, op, ": x must be [N, I] with batch_sizes, got ", shape_text(x));
    return offsets_of(op, x.size(0), *batch_sizes);
  }
  STD_TORCH_CHECK(x.dim() == 3, op, ": x must be [T, B, I], got ", shape_text(x));
  std::vector<int64_t> offsets(x.size(0) + 1);
  for (int64_t t = 0; t <= x.size(0); ++t) offsets[t] = t * x.size(1);
  return offsets;
}

// What every op of a recurrence takes; an op without one of the optional tensors leaves it out.
struct Arguments {
  const char* op;
  Mode mode;
  const Tensor& x;
  const OptionalTensor& h0;
  const OptionalTensor& c0;
  const Tensor& w_ih;
  const Tensor& w_hh;
  const OptionalTensor& w_hr;
  const OptionalTensor& batch_sizes;
  const OptionalTensor& lengths;
  bool reverse;
  bool tf32;
};

inline const OptionalTensor kNone;

// Sizes and inputs that forward and backward have in common, checked; keeps dense copies alive for the call.
template <typename S>
class Recurrence {
 public:
  explicit Recurrence(const Arguments& a)
      : op_(a.op),
        place(place_of(a.x)),
        offsets_(row_offsets(a.op, a.x, a.batch_sizes)),
        packed_(a.batch_sizes.has_value()),
        sizes(fill_sizes(a)),
        x_(dense_rows("x", a.x, sizes.input)),
        h0_(state_input("h0", a.h0, sizes.output)),
        c0_(state_input("c0", a.c0, sizes.hidden)),
        w_ih_(input("w_ih", a.w_ih, {gates(), sizes.input})),
        w_hh_(input("w_hh", a.w_hh, {gates(), sizes.output})),
        w_hr_(input("w_hr", a.w_hr, {sizes.output, sizes.hidden})),
        lengths_(a.lengths, op_, "lengths", {sizes.batch}, ScalarType::Long, place),
        layer_state_(a.h0.has_value() && a.h0->dim() == 3) {
    STD_TORCH_CHECK(!packed_ || !a.lengths.has_value(), op_, ": lengths and batch_sizes exclude each other");
  }

  int64_t gates() const { return gates_of(sizes.mode) * sizes.hidden; }

  // x and y are [T, B, *] or, packed, [N, *].
  Tensor dense_rows(const char* name, const Tensor& t, int64_t width) const {
    if (packed_) {
      check_tensor(t, op_, name, kScalarType<S>, {rows(), width}, place);
    } else {
      check_tensor(t, op_, name, kScalarType<S>, {sizes.steps, sizes.batch, width}, place);
    }
    return place.is_cpu() ? dense(t) : aligned(t);
  }

  Tensor empty_rows(int64_t width) const {
    if (packed_) return empty({rows(), width}, kScalarType<S>, place);
    return empty({sizes.steps, sizes.batch, width}, kScalarType<S>, place);
  }

  // What is saved for the backward pass, [N, width] always.
  Tensor empty_saved(bool wanted) const {
    return empty({wanted ? rows() : 0, saved_blocks(sizes.mode, sizes.projected()) * sizes.hidden}, kScalarType<S>,
                 place);
  }

  // A state is [B, *], or [1, B, *] as torch.nn lays out the state of one layer; results take the shape of h0.
  Input<S> state_input(const char* name, const OptionalTensor& t, int64_t width) const {
    if (t.has_value() && t->dim() == 3) return input(name, t, {1, sizes.batch, width});
    return input(name, t, {sizes.batch, width});
  }

  Output<S> state_output(bool wanted, int64_t width) const {
    if (layer_state_) return output(wanted, {1, sizes.batch, width});
    return output(wanted, {sizes.batch, width});
  }

  Input<S> input(const char* name, const OptionalTensor& t, std::initializer_list<int64_t> shape) const {
    return Input<S>(t, op_, name, shape, kScalarType<S>, place);
  }
  Output<S> output(bool wanted, std::initializer_list<int64_t> shape) const { return Output<S>(wanted, shape, place); }

  const Tensor& x_tensor() const { return x_; }
  const Tensor& w_ih_tensor() const { return *w_ih_.tensor(); }
  const OptionalTensor& h0_tensor() const { return h0_.tensor(); }
  const OptionalTensor& c0_tensor() const { return c0_.tensor(); }
  const S* x() const { return data<S>(x_); }
  const S* h0() const { return h0_.get(); }
  const S* c0() const { return c0_.get(); }
  const S* w_ih() const { return w_ih_.get(); }
  const S* w_hh() const { return w_hh_.get(); }
  const S* w_hr() const { return w_hr_.get(); }
  const int64_t* lengths() const { return lengths_.get(); }
  int64_t rows() const { return offsets_.back(); }
  bool packed() const { return packed_; }
  const std::vector<int64_t>& offsets() const { return offsets_; }

 private:
  RecurrenceSizes fill_sizes(const Arguments& a) const {
    STD_TORCH_CHECK(a.w_ih.dim() == 2 && a.w_ih.size(0) % gates_of(a.mode) == 0, op_, ": w_ih must be [G H, I], got ",
                    shape_text(a.w_ih));
    RecurrenceSizes s;
    s.mode = a.mode;
    s.steps = static_cast<int64_t>(offsets_.size()) - 1;
    if (packed_) {
      STD_TORCH_CHECK(a.h0.has_value() && a.h0->dim() >= 2, op_, ": h0 must be [B, H] with batch_sizes");
      s.batch = s.steps > 0 ? offsets_[1] : a.h0->size(a.h0->dim() - 2);
    } else {
      s.batch = a.x.size(1);
    }
    s.input = a.w_ih.size(1);
    s.hidden = a.w_ih.size(0) / gates_of(a.mode);
    s.output = s.hidden;
    if (a.w_hr.has_value()) {
      STD_TORCH_CHECK(a.w_hr->dim() == 2 && a.w_hr->size(0) < s.hidden, op_, ": w_hr must be [P, H], P < H, got ",
                      shape_text(*a.w_hr));
      s.output = a.w_hr->size(0);
    }
    s.row_offsets = offsets_.data();
    s.reverse = a.reverse;
    return s;
  }

  const char* op_;

 public:
  const Place place;

 private:
  std::vector<int64_t> offsets_;
  bool packed_;

 public:
  const RecurrenceSizes sizes;

 private:
  Tensor x_;
  Input<S> h0_;
  Input<S> c0_;
  Input<S> w_ih_;
  Input<S> w_hh_;
  Input<S> w_hr_;
  Input<int64_t> lengths_;
  bool layer_state_;
};

// Results of a forward op; those that the op has not stay empty.
struct ForwardResults {
  Tensor y;
  Tensor h_n;
  OptionalTensor c_n;
  OptionalTensor saved;
};

// Which gradients are wanted.
struct Needs {
  bool dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr;
};

// Gradients; those that are not wanted have no elements.
struct BackwardResults {
  Tensor dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr;
};

template <typename Backend>
std::tuple<Tensor, Tensor> rnn_forward(const Tensor& x, const OptionalTensor& h0, const Tensor& w_ih,
                                       const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                       const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                                       const std::string& nonlinearity, bool reverse, bool tf32) {
  constexpr const char* kOp = "rnn_forward";
  const Arguments a = {
      kOp, rnn_mode(kOp, nonlinearity), x, h0, kNone, w_ih, w_hh, kNone, batch_sizes, lengths, reverse, tf32};
  ForwardResults r = Backend::forward(a, b_ih, b_hh, false);
  return {std::move(r.y), std::move(r.h_n)};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> gru_forward(const Tensor& x, const OptionalTensor& h0, const Tensor& w_ih,
                                               const Tensor& w_hh, const OptionalTensor& b_ih,
                                               const OptionalTensor& b_hh, const OptionalTensor& batch_sizes,
                                               const OptionalTensor& lengths, bool reverse, bool tf32, bool needs_autograd) {
  const Arguments a = {"gru_forward", Mode::kGru, x, h0, kNone, w_ih, w_hh, kNone, batch_sizes, lengths, reverse, tf32};
  ForwardResults r = Backend::forward(a, b_ih, b_hh, needs_autograd);
  return {std::move(r.y), std::move(r.h_n), std::move(*r.saved)};
}

inline void check_states(const char* op, const OptionalTensor& h0, const OptionalTensor& c0) {
  STD_TORCH_CHECK(h0.has_value() == c0.has_value(), op, ": h0 and c0 must be given together");
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_forward(
    const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
    const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& w_hr,
    const OptionalTensor& batch_sizes, const OptionalTensor& lengths, bool reverse, bool tf32, bool needs_autograd) {
  const Arguments a = {"lstm_forward", Mode::kLstm, x, h0, c0, w_ih, w_hh, w_hr, batch_sizes, lengths, reverse, tf32};
  check_states(a.op, h0, c0);
  ForwardResults r = Backend::forward(a, b_ih, b_hh, needs_autograd);
  return {std::move(r.y), std::move(r.h_n), std::move(*r.c_n), std::move(*r.saved)};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rnn_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_h_n, const Tensor& x, const OptionalTensor& h0,
    const Tensor& w_ih, const Tensor& w_hh, const Tensor& y, const OptionalTensor& batch_sizes,
    const OptionalTensor& lengths, const std::string& nonlinearity, bool reverse, bool tf32, bool need_dx,
    bool need_dh0, bool need_dw_ih, bool need_dw_hh, bool need_db_ih, bool need_db_hh) {
  constexpr const char* kOp = "rnn_backward";
  const Arguments a = {
      kOp, rnn_mode(kOp, nonlinearity), x, h0, kNone, w_ih, w_hh, kNone, batch_sizes, lengths, reverse, tf32};
  const Needs need = {need_dx, need_dh0, false, need_dw_ih, need_dw_hh, need_db_ih, need_db_hh, false};
  BackwardResults r = Backend::backward(a, grad_y, grad_h_n, kNone, y, kNone, need);
  return {std::move(r.dx),    std::move(r.dh0),   std::move(r.dw_ih),
          std::move(r.dw_hh), std::move(r.db_ih), std::move(r.db_hh)};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_h_n, const Tensor& x, const OptionalTensor& h0,
    const Tensor& w_ih, const Tensor& w_hh, const Tensor& y, const Tensor& saved, const OptionalTensor& batch_sizes,
    const OptionalTensor& lengths, bool reverse, bool tf32, bool need_dx, bool need_dh0, bool need_dw_ih,
    bool need_dw_hh, bool need_db_ih, bool need_db_hh) {
  const Arguments a = {"gru_backward", Mode::kGru, x,           h0,      kNone,   w_ih,
                       w_hh,           kNone,      batch_sizes, lengths, reverse, tf32};
  const Needs need = {need_dx, need_dh0, false, need_dw_ih, need_dw_hh, need_db_ih, need_db_hh, false};
  BackwardResults r = Backend::backward(a, grad_y, grad_h_n, kNone, y, saved, need);
  return {std::move(r.dx),    std::move(r.dh0),   std::move(r.dw_ih),
          std::move(r.dw_hh), std::move(r.db_ih), std::move(r.db_hh)};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n, const Tensor& x,
    const OptionalTensor& h0, const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
    const OptionalTensor& w_hr, const Tensor& y, const Tensor& saved, const OptionalTensor& batch_sizes,
    const OptionalTensor& lengths, bool reverse, bool tf32, bool need_dx, bool need_dh0, bool need_dc0, bool need_dw_ih,
    bool need_dw_hh, bool need_db_ih, bool need_db_hh, bool need_dw_hr) {
  const Arguments a = {"lstm_backward", Mode::kLstm, x, h0, c0, w_ih, w_hh, w_hr, batch_sizes, lengths, reverse, tf32};
  check_states(a.op, h0, c0);
  const Needs need = {need_dx, need_dh0, need_dc0, need_dw_ih, need_dw_hh, need_db_ih, need_db_hh, need_dw_hr};
  BackwardResults r = Backend::backward(a, grad_y, grad_h_n, grad_c_n, y, saved, need);
  return {std::move(r.dx),    std::move(r.dh0),   std::move(r.dc0),   std::move(r.dw_ih),
          std::move(r.dw_hh), std::move(r.db_ih), std::move(r.db_hh), std::move(r.dw_hr)};
}

}  // namespace llm_ext
