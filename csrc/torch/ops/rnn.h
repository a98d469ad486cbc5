// The ops rnn_*, gru_* and lstm_*, as every backend has them: arguments, checks, results, registration.
//
// A backend is a struct with two functions,
//   static RnnForwardResults forward(const RnnForwardArguments&);
//   static RnnBackwardResults backward(const RnnBackwardArguments&);
// and registers its ops with register_rnn_ops<Backend>(m).
#pragma once

#include <cstdint>
#include <exception>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "params/rnn.h"
#include "torch/alloc/empty.h"
#include "torch/device.h"
#include "torch/dtypes.h"
#include "torch/ops/op_signature.h"
#include "torch/stable.h"
#include "torch/tensor.h"
#include "torch/tensor_args.h"

namespace llm_ext {

// ---- modes

// `name` as torch.nn.RNNBase.mode spells it.
inline Mode mode_named(const char* op, const std::string& name) {
  if (name == "RNN_TANH") return Mode::kRnnTanh;
  if (name == "RNN_RELU") return Mode::kRnnRelu;
  if (name == "RNN_SIGMOID") return Mode::kRnnSigmoid;
  if (name == "GRU") return Mode::kGru;
  if (name == "LSTM") return Mode::kLstm;
  STD_TORCH_CHECK(false, op, ": mode must be RNN_TANH, RNN_RELU, RNN_SIGMOID, GRU or LSTM, got ", name);
}

// The mode of an Elman RNN with this nonlinearity.
inline Mode rnn_mode(const char* op, const std::string& nonlinearity) {
  if (nonlinearity == "tanh") return Mode::kRnnTanh;
  if (nonlinearity == "relu") return Mode::kRnnRelu;
  if (nonlinearity == "sigmoid") return Mode::kRnnSigmoid;
  STD_TORCH_CHECK(false, op, ": nonlinearity must be tanh, relu or sigmoid, got ", nonlinearity);
}

// ---- arguments and results

// The arguments that all six ops share, as the dispatcher passes them. They are valid for the duration of the call. An
// op without one of them leaves its default.
struct RnnArguments {
  const char* op = nullptr;
  Mode mode = Mode::kRnnTanh;
  const Tensor* x = nullptr;
  const OptionalTensor* h0 = &kNone;
  const OptionalTensor* c0 = &kNone;
  const Tensor* w_ih = nullptr;
  const Tensor* w_hh = nullptr;
  const OptionalTensor* w_hr = &kNone;
  const OptionalTensor* batch_sizes = &kNone;
  const OptionalTensor* lengths = &kNone;
  const std::string* nonlinearity = nullptr;
  bool reverse = false;
  bool tf32 = false;
};

struct RnnForwardArguments : RnnArguments {
  const OptionalTensor* b_ih = &kNone;
  const OptionalTensor* b_hh = &kNone;
  bool needs_autograd = false;
};

struct RnnForwardResults {
  Tensor y;
  Tensor h_n;
  OptionalTensor c_n;    // only LSTM
  OptionalTensor saved;  // only where saved_blocks() > 0
};

struct RnnBackwardArguments : RnnArguments {
  const OptionalTensor* grad_y = &kNone;
  const OptionalTensor* grad_h_n = &kNone;
  const OptionalTensor* grad_c_n = &kNone;
  const Tensor* y = nullptr;
  const Tensor* saved = nullptr;  // null for Elman RNNs
  bool need_dx = false;
  bool need_dh0 = false;
  bool need_dc0 = false;
  bool need_dw_ih = false;
  bool need_dw_hh = false;
  bool need_db_ih = false;
  bool need_db_hh = false;
  bool need_dw_hr = false;
};

// Gradients that are not needed have no elements.
struct RnnBackwardResults {
  Tensor dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr;
};

// ---- checks

// T + 1 numbers for the steps of a sequence.
inline std::vector<int64_t> empty_row_offsets(int64_t steps) {
  std::vector<int64_t> offsets;
  try {
    offsets.resize(steps + 1);
  } catch (const std::exception&) {
    STD_TORCH_CHECK(false, "llm_ext: out of memory: cannot allocate the row offsets of ", steps, " steps");
  }
  return offsets;
}

// Checks the batch sizes of a packed sequence of `rows` rows. Returns the rows of its first step, 0 without steps.
inline int64_t check_batch_sizes(const char* op, int64_t rows, const Tensor& batch_sizes) {
  STD_TORCH_CHECK(batch_sizes.dim() == 1, op, ": batch_sizes must be [T], got ", shape_text(batch_sizes));
  const int64_t steps = batch_sizes.size(0);
  check_tensor(batch_sizes, op, "batch_sizes", ScalarType::Long, {steps});
  STD_TORCH_CHECK(steps <= rows, op, ": batch_sizes must be positive and sum to the rows of x, ", rows, ", got ", steps,
                  " steps");
  const Numbers sizes(batch_sizes);
  const int64_t read = distinct(batch_sizes, 0);
  int64_t sum = 0;
  for (int64_t t = 0; t < read; ++t) {
    const int64_t size = sizes[t];
    STD_TORCH_CHECK(size >= 1 && (t == 0 || size <= sizes[t - 1]), op,
                    ": batch_sizes must be positive and never rise, got ", size, " at step ", t);
    STD_TORCH_CHECK(size <= rows - sum, op, ": batch_sizes must sum to the rows of x, ", rows, ", got more");
    sum += size;
  }
  if (read < steps) {
    STD_TORCH_CHECK(sum <= rows / steps, op, ": batch_sizes must sum to the rows of x, ", rows, ", got more");
    sum *= steps;
  }
  STD_TORCH_CHECK(sum == rows, op, ": batch_sizes must sum to the rows of x, ", rows, ", got ", sum);
  return steps > 0 ? sizes[0] : 0;
}

// First row of each step of a sequence, and the end. They take memory: all checks of a call come before them, and a
// call that runs no kernel needs none.
inline std::vector<int64_t> packed_row_offsets(const Tensor& batch_sizes) {
  const int64_t steps = batch_sizes.size(0);
  std::vector<int64_t> offsets = empty_row_offsets(steps);
  const Numbers sizes(batch_sizes);
  for (int64_t t = 0; t < steps; ++t) offsets[t + 1] = offsets[t] + sizes[t];
  return offsets;
}
inline std::vector<int64_t> padded_row_offsets(int64_t steps, int64_t batch) {
  std::vector<int64_t> offsets = empty_row_offsets(steps);
  for (int64_t t = 0; t <= steps; ++t) offsets[t] = t * batch;
  return offsets;
}

inline void check_states(const char* op, const OptionalTensor& h0, const OptionalTensor& c0) {
  STD_TORCH_CHECK(h0.has_value() == c0.has_value(), op, ": h0 and c0 must be given together");
  STD_TORCH_CHECK(!h0.has_value() || h0->dim() == c0->dim(), op, ": c0 must have as many dimensions as h0, got ",
                  shape_text(*c0));
}

// Checked sizes and inputs of a forward or backward op. Owns dense copies for the duration of the call.
template <typename S>
class CheckedRnnArguments {
 public:
  explicit CheckedRnnArguments(const RnnArguments& a)
      : op_(a.op),
        device_(device_of(*a.x)),
        batch_sizes_(*a.batch_sizes),
        packed_(batch_sizes_.has_value()),
        rows_(a.x->dim() > 0 ? a.x->size(0) : 0),
        sizes_(sizes_of(a)),
        steps_(sizes_.steps),
        h0_(state_input("h0", *a.h0, sizes_.output)),
        c0_(state_input("c0", *a.c0, sizes_.hidden)),
        w_ih_(input("w_ih", *a.w_ih, {gates(), sizes_.input})),
        w_hh_(input("w_hh", *a.w_hh, {gates(), sizes_.output})),
        w_hr_(input("w_hr", *a.w_hr, {sizes_.output, sizes_.hidden})),
        lengths_(*a.lengths, op_, "lengths", {sizes_.batch}, device_),
        x_(rows_input("x", *a.x, sizes_.input)),
        layer_state_(!a.h0->has_value() || (*a.h0)->dim() == 3) {
    STD_TORCH_CHECK(!packed_ || !a.lengths->has_value(), op_, ": lengths and batch_sizes exclude each other");
    if (sizes_.batch == 0) sizes_.steps = 0;  // steps without rows take no memory, whatever their number
  }

  const Device& device() const { return device_; }
  // Without row offsets.
  const RecurrenceSizes& sizes() const { return sizes_; }
  std::vector<int64_t> row_offsets() const {
    return packed_ ? packed_row_offsets(*batch_sizes_) : padded_row_offsets(sizes_.steps, sizes_.batch);
  }
  int64_t steps() const { return steps_; }
  int64_t rows() const { return packed_ ? rows_ : sizes_.steps * sizes_.batch; }
  int64_t gates() const { return gates_of(sizes_.mode) * sizes_.hidden; }
  bool packed() const { return packed_; }

  const Tensor& x_tensor() const { return *x_.tensor(); }
  const Tensor& w_ih_tensor() const { return *w_ih_.tensor(); }
  const OptionalTensor& h0_tensor() const { return h0_.tensor(); }
  const OptionalTensor& c0_tensor() const { return c0_.tensor(); }
  const S* x() const { return x_.get(); }
  const S* h0() const { return h0_.get(); }
  const S* c0() const { return c0_.get(); }
  const S* w_ih() const { return w_ih_.get(); }
  const S* w_hh() const { return w_hh_.get(); }
  const S* w_hr() const { return w_hr_.get(); }
  const int64_t* lengths() const { return lengths_.get(); }

  // x and y are [T, B, *] or, packed, [N, *].
  Input<S> rows_input(const char* name, const OptionalTensor& t, int64_t width) const {
    if (packed_) return input(name, t, {rows(), width});
    return input(name, t, {steps_, sizes_.batch, width});
  }
  Tensor empty_rows(int64_t width) const {
    if (packed_) return empty({rows(), width}, kScalarType<S>, device_);
    return empty({steps_, sizes_.batch, width}, kScalarType<S>, device_);
  }

  // The saved activations, [N, width] also where x is [T, B, I].
  Tensor empty_saved(bool wanted) const {
    return empty({wanted ? rows() : 0, saved_blocks(sizes_.mode, sizes_.projected()) * sizes_.hidden}, kScalarType<S>,
                 device_);
  }

  // A graph that was traced or exported without gradients keeps needs_autograd=False when it is trained.
  void check_saved(const Tensor& saved) const {
    STD_TORCH_CHECK(rows() == 0 || saved.size(0) != 0, op_,
                    ": the forward pass has saved no activations, because gradients were disabled when the graph was "
                    "recorded; trace or export it with gradients enabled");
  }

  // A state is [B, *], or [1, B, *] as torch.nn shapes the state of one layer; results take the shape of h0, and
  // [1, B, *] without it.
  Input<S> state_input(const char* name, const OptionalTensor& t, int64_t width) const {
    if (t.has_value() && t->dim() == 3) return input(name, t, {1, sizes_.batch, width});
    return input(name, t, {sizes_.batch, width});
  }
  Output<S> state_output(bool wanted, int64_t width) const {
    if (layer_state_) return output(wanted, {1, sizes_.batch, width});
    return output(wanted, {sizes_.batch, width});
  }

  Input<S> input(const char* name, const OptionalTensor& t, std::initializer_list<int64_t> shape) const {
    return Input<S>(t, op_, name, shape, device_);
  }
  Output<S> output(bool wanted, std::initializer_list<int64_t> shape) const {
    return Output<S>(wanted, shape, device_);
  }

 private:
  RecurrenceSizes sizes_of(const RnnArguments& a) const {
    const Tensor& w_ih = *a.w_ih;
    const OptionalTensor &h0 = *a.h0, &w_hr = *a.w_hr;
    STD_TORCH_CHECK(w_ih.dim() == 2 && w_ih.size(0) % gates_of(a.mode) == 0, op_, ": w_ih must be [G H, I], got ",
                    shape_text(w_ih));
    RecurrenceSizes s = {};
    s.mode = a.mode;
    if (packed_) {
      STD_TORCH_CHECK(a.x->dim() == 2, op_, ": x must be [N, I] with batch_sizes, got ", shape_text(*a.x));
      s.batch = check_batch_sizes(op_, rows_, *batch_sizes_);
      s.steps = batch_sizes_->size(0);
      STD_TORCH_CHECK(h0.has_value() && h0->dim() >= 2, op_, ": h0 must be [B, H] with batch_sizes");
      if (s.steps == 0) s.batch = h0->size(h0->dim() - 2);
    } else {
      STD_TORCH_CHECK(a.x->dim() == 3, op_, ": x must be [T, B, I], got ", shape_text(*a.x));
      s.steps = a.x->size(0);
      s.batch = a.x->size(1);
    }
    s.input = w_ih.size(1);
    s.hidden = w_ih.size(0) / gates_of(a.mode);
    s.output = s.hidden;
    if (w_hr.has_value()) {
      STD_TORCH_CHECK(w_hr->dim() == 2 && w_hr->size(0) < s.hidden, op_, ": w_hr must be [P, H], P < H, got ",
                      shape_text(*w_hr));
      s.output = w_hr->size(0);
    }
    s.reverse = a.reverse;
    return s;
  }

  // In this order: each is initialized from those above it.
  const char* op_;
  const Device device_;
  const OptionalTensor& batch_sizes_;
  const bool packed_;
  const int64_t rows_;     // N if packed
  RecurrenceSizes sizes_;  // of what the kernels run
  const int64_t steps_;    // of x and y
  const Input<S> h0_;
  const Input<S> c0_;
  const Input<S> w_ih_;
  const Input<S> w_hh_;
  const Input<S> w_hr_;
  const Input<int64_t> lengths_;
  const Input<S> x_;
  const bool layer_state_;
};

// ---- the ops

// One description each: name, and arguments and results in the order of the schema.

struct RnnForward {
  using A = RnnForwardArguments;
  using R = RnnForwardResults;
  static constexpr const char* kName = "rnn_forward";
  static Mode mode(const A& a) { return rnn_mode(kName, *a.nonlinearity); }
  using Arguments = Members<&A::x, &A::h0, &A::w_ih, &A::w_hh, &A::b_ih, &A::b_hh, &A::batch_sizes, &A::lengths,
                            &A::nonlinearity, &A::reverse, &A::tf32>;
  using Results = Members<&R::y, &R::h_n>;
};

struct RnnBackward {
  using A = RnnBackwardArguments;
  using R = RnnBackwardResults;
  static constexpr const char* kName = "rnn_backward";
  static Mode mode(const A& a) { return rnn_mode(kName, *a.nonlinearity); }
  using Arguments = Members<&A::grad_y, &A::grad_h_n, &A::x, &A::h0, &A::w_ih, &A::w_hh, &A::y, &A::batch_sizes,
                            &A::lengths, &A::nonlinearity, &A::reverse, &A::tf32, &A::need_dx, &A::need_dh0,
                            &A::need_dw_ih, &A::need_dw_hh, &A::need_db_ih, &A::need_db_hh>;
  using Results = Members<&R::dx, &R::dh0, &R::dw_ih, &R::dw_hh, &R::db_ih, &R::db_hh>;
};

struct GruForward {
  using A = RnnForwardArguments;
  using R = RnnForwardResults;
  static constexpr const char* kName = "gru_forward";
  static Mode mode(const A&) { return Mode::kGru; }
  using Arguments = Members<&A::x, &A::h0, &A::w_ih, &A::w_hh, &A::b_ih, &A::b_hh, &A::batch_sizes, &A::lengths,
                            &A::reverse, &A::tf32, &A::needs_autograd>;
  using Results = Members<&R::y, &R::h_n, &R::saved>;
};

struct GruBackward {
  using A = RnnBackwardArguments;
  using R = RnnBackwardResults;
  static constexpr const char* kName = "gru_backward";
  static Mode mode(const A&) { return Mode::kGru; }
  using Arguments = Members<&A::grad_y, &A::grad_h_n, &A::x, &A::h0, &A::w_ih, &A::w_hh, &A::y, &A::saved,
                            &A::batch_sizes, &A::lengths, &A::reverse, &A::tf32, &A::need_dx, &A::need_dh0,
                            &A::need_dw_ih, &A::need_dw_hh, &A::need_db_ih, &A::need_db_hh>;
  using Results = Members<&R::dx, &R::dh0, &R::dw_ih, &R::dw_hh, &R::db_ih, &R::db_hh>;
};

struct LstmForward {
  using A = RnnForwardArguments;
  using R = RnnForwardResults;
  static constexpr const char* kName = "lstm_forward";
  static Mode mode(const A&) { return Mode::kLstm; }
  using Arguments = Members<&A::x, &A::h0, &A::c0, &A::w_ih, &A::w_hh, &A::b_ih, &A::b_hh, &A::w_hr, &A::batch_sizes,
                            &A::lengths, &A::reverse, &A::tf32, &A::needs_autograd>;
  using Results = Members<&R::y, &R::h_n, &R::c_n, &R::saved>;
};

struct LstmBackward {
  using A = RnnBackwardArguments;
  using R = RnnBackwardResults;
  static constexpr const char* kName = "lstm_backward";
  static Mode mode(const A&) { return Mode::kLstm; }
  using Arguments =
      Members<&A::grad_y, &A::grad_h_n, &A::grad_c_n, &A::x, &A::h0, &A::c0, &A::w_ih, &A::w_hh, &A::w_hr, &A::y,
              &A::saved, &A::batch_sizes, &A::lengths, &A::reverse, &A::tf32, &A::need_dx, &A::need_dh0, &A::need_dc0,
              &A::need_dw_ih, &A::need_dw_hh, &A::need_db_ih, &A::need_db_hh, &A::need_dw_hr>;
  using Results = Members<&R::dx, &R::dh0, &R::dc0, &R::dw_ih, &R::dw_hh, &R::db_ih, &R::db_hh, &R::dw_hr>;
};

template <typename Backend>
RnnForwardResults run_on(const RnnForwardArguments& a) {
  return Backend::forward(a);
}
template <typename Backend>
RnnBackwardResults run_on(const RnnBackwardArguments& a) {
  return Backend::backward(a);
}

// An op of the list above on one backend.
template <typename Backend, typename Description>
struct RnnOp : Description {
  static typename Description::R run(typename Description::A& a) {
    a.op = Description::kName;
    a.mode = Description::mode(a);
    if (a.mode == Mode::kLstm) check_states(a.op, *a.h0, *a.c0);
    return run_on<Backend>(a);
  }
};

template <typename Backend, typename... Descriptions, typename Library>
void register_described(Library& m) {
  (m.impl(Descriptions::kName, TORCH_BOX((&OpFunction<RnnOp<Backend, Descriptions>>::call))), ...);
}

template <typename Backend, typename Library>
void register_rnn_ops(Library& m) {
  register_described<Backend, RnnForward, RnnBackward, GruForward, GruBackward, LstmForward, LstmBackward>(m);
}

}  // namespace llm_ext
