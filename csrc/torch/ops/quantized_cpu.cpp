// quantized_rnn_forward and quantized_linear_forward on the CPU.
#include <cstdint>
#include <initializer_list>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "params/quantized.h"
#include "torch/alloc/empty.h"
#include "torch/alloc/workspace.h"
#include "torch/dtypes.h"
#include "torch/ops/packed_lengths.h"
#include "torch/ops/rnn.h"
#include "torch/ops/rnn_cpu.h"
#include "torch/stable.h"
#include "torch/tensor.h"
#include "torch/tensor_args.h"
#include "torch/threads/run_team.h"

namespace llm_ext {
namespace {

// The type of the elements of a packed weight: bfloat16 is passed as int16, which no cast of a module changes.
template <typename W>
constexpr ScalarType kPackedType = sizeof(W) == 1 ? ScalarType::Char : ScalarType::Short;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An optional tensor of float32, whatever the type of the weights. A cast of the module casts scales and biases.
Input<float> float32_input(const OptionalTensor& t, const char* op, const char* name,
                           std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(!t.has_value() || t->scalar_type() == ScalarType::Float, op, ": ", name,
                  " must be float32 with quantized weights");
  return {t, op, name, sizes};
}

// Checks a packed matrix of `blocks` blocks of `rows` rows of `columns` numbers, packed at `depth`. Owns dense copies,
// which get() makes.
template <typename W>
class Packed {
 public:
  Packed(const OptionalTensor& w, const char* name, const OptionalTensor& scale, const char* scale_name, const char* op,
         int64_t blocks, int64_t rows, int64_t columns, int64_t depth)
      : scale_(float32_input(scale, op, scale_name, {blocks * rows})) {
    if (!w.has_value()) return;
    STD_TORCH_CHECK(sizeof(W) != 1 || columns <= kMaxInt8Columns, op, ": ", name, " has ", columns,
                    " columns, and an int8 weight may have at most ", kMaxInt8Columns);
    const int64_t units = divide_up(columns, depth) + (depth == kByteDepth ? 1 : 0);
    STD_TORCH_CHECK(w->is_cpu() && w->scalar_type() == kPackedType<W> &&
                        has_sizes(*w, {divide_up(rows, kQuantizedPanel), blocks, units, kQuantizedPanel, depth}),
                    op, ": ", name, " must be the packed weight [", blocks * rows, ", ", columns, "], got ",
                    shape_text(*w));
    STD_TORCH_CHECK(scale.has_value() == (sizeof(W) == 1), op, ": ", name, " must have a scale exactly if it is int8");
    w_ = *w;
  }
  // After all checks of the call.
  QuantizedMatrix<W> get() {
    if (w_.has_value()) w_ = dense(*w_);
    return {w_.has_value() ? data<W>(*w_) : nullptr, scale_.get()};
  }

 private:
  OptionalTensor w_;
  Input<float> scale_;
};

// Calls run(W{}) with the type of the packed weight w.
template <typename Run>
auto with_weight_type(const Tensor& w, const char* op, const Run& run) {
  if (w.scalar_type() == kPackedType<int8_t>) return run(int8_t{});
  STD_TORCH_CHECK(w.scalar_type() == kPackedType<BFloat16>, op, ": packed weights must be int8 or int16");
  return run(BFloat16{});
}

using Results = std::tuple<Tensor, Tensor, Tensor>;

Results quantized_rnn_forward(const std::string& mode_name, const Tensor& x, const OptionalTensor& h0,
                              const OptionalTensor& c0, const Tensor& w_ih, const OptionalTensor& s_ih,
                              const Tensor& w_hh, const OptionalTensor& s_hh, const OptionalTensor& b_ih,
                              const OptionalTensor& b_hh, const OptionalTensor& w_hr, const OptionalTensor& s_hr,
                              const OptionalTensor& batch_sizes, const OptionalTensor& lengths, int64_t input,
                              int64_t hidden, int64_t output, bool reverse) {
  constexpr const char* kOp = "quantized_rnn_forward";
  const Mode mode = mode_named(kOp, mode_name);
  const bool lstm = mode == Mode::kLstm;
  STD_TORCH_CHECK(lstm ? h0.has_value() == c0.has_value() : !c0.has_value(), kOp,
                  ": c0 must be given with the h0 of an LSTM, and only then");
  STD_TORCH_CHECK(hidden > 0 && output > 0 && output <= hidden, kOp, ": output must be from 1 to hidden");
  STD_TORCH_CHECK(input >= 0 && input <= kMaxVolume && hidden <= kMaxVolume, kOp, ": input and hidden are too large");
  STD_TORCH_CHECK(w_hr.has_value() == (output < hidden) && (lstm || output == hidden), kOp,
                  ": w_hr must be given exactly if the output of an LSTM is projected");
  STD_TORCH_CHECK(!batch_sizes.has_value() || !lengths.has_value(), kOp,
                  ": lengths and batch_sizes exclude each other");
  const bool is_packed = batch_sizes.has_value();
  STD_TORCH_CHECK(x.dim() == (is_packed ? 2 : 3), kOp, ": x must be [T, B, I], or [N, I] with batch_sizes, got ",
                  shape_text(x));
  check_volume(x, kOp, "x");
  int64_t steps = x.size(0), batch = 0;
  if (!is_packed) {
    batch = x.size(1);
  } else {
    batch = check_batch_sizes(kOp, x.size(0), *batch_sizes);
    steps = batch_sizes->size(0);
    STD_TORCH_CHECK(h0.has_value() && h0->dim() >= 2, kOp, ": h0 must be [B, P] with batch_sizes");
    if (steps == 0) batch = h0->size(h0->dim() - 2);
  }
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float, kOp, ": x must be float32 on cpu");
  STD_TORCH_CHECK(x.size(x.dim() - 1) == input, kOp, ": x must have I = ", input, " features, got ", shape_text(x));
  const bool layer_state = !h0.has_value() || h0->dim() == 3;
  const auto state = [&](const OptionalTensor& t, const char* name, int64_t width) {
    if (layer_state) return float32_input(t, kOp, name, {1, batch, width});
    return float32_input(t, kOp, name, {batch, width});
  };
  const auto new_state = [&](bool wanted, int64_t width) {
    if (!wanted) return empty({0}, ScalarType::Float);
    return layer_state ? empty({1, batch, width}, ScalarType::Float) : empty({batch, width}, ScalarType::Float);
  };
  const Input<float> h0_in = state(h0, "h0", output), c0_in = state(c0, "c0", hidden);

  return with_weight_type(w_ih, kOp, [&](auto type) -> Results {
    using W = decltype(type);
    const int64_t gates = gates_of(mode);
    Packed<W> ih(w_ih, "w_ih", s_ih, "s_ih", kOp, gates, hidden, input, kInputDepth);
    Packed<W> hh(w_hh, "w_hh", s_hh, "s_hh", kOp, gates, hidden, output, kStateDepth<W>);
    Packed<W> hr(w_hr, "w_hr", s_hr, "s_hr", kOp, 1, output, hidden, kStateDepth<W>);
    const Input<float> b_ih_in = float32_input(b_ih, kOp, "b_ih", {gates * hidden});
    const Input<float> b_hh_in = float32_input(b_hh, kOp, "b_hh", {gates * hidden});
    const auto new_states = [&] { return std::pair(new_state(true, output), new_state(lstm, hidden)); };
    if (lengths.has_value()) {
      const PackedLengths<float> packing(kOp, *lengths, steps, batch);
      const auto [h_n, c_n] = new_states();
      const OptionalTensor packed_c0 = lstm ? OptionalTensor(packing.pack_state(c0_in.tensor(), hidden)) : kNone;
      const auto [y, h, c] = quantized_rnn_forward(
          mode_name, packing.pack(x), packing.pack_state(h0_in.tensor(), output), packed_c0, w_ih, s_ih, w_hh, s_hh,
          b_ih, b_hh, w_hr, s_hr, packing.batch_sizes(), kNone, input, hidden, output, reverse);
      packing.pad_state(h, h0_in.tensor(), h_n);
      if (lstm) packing.pad_state(c, c0_in.tensor(), c_n);
      return {packing.pad(y), h_n, c_n};
    }
    const Tensor x_in = dense(x);
    const auto [h_n, c_n] = new_states();
    const Tensor y =
        is_packed ? empty({x.size(0), output}, ScalarType::Float) : empty({steps, batch, output}, ScalarType::Float);
    if (!any_elements(y)) {
      copy_state(batch * output, h0_in.get(), mutable_data<float>(h_n));
      copy_state(batch * hidden, c0_in.get(), lstm ? mutable_data<float>(c_n) : nullptr);
      return {y, h_n, c_n};
    }
    const std::vector<int64_t> offsets =
        is_packed ? packed_row_offsets(*batch_sizes) : padded_row_offsets(steps, batch);
    QuantizedRecurrenceParams<W> p = {};
    p.call.sizes = {mode, steps, batch, input, hidden, output, offsets.data(), reverse};
    p.call.x = data<float>(x_in);
    p.call.h0 = h0_in.get();
    p.call.c0 = c0_in.get();
    p.call.b_ih = b_ih_in.get();
    p.call.b_hh = b_hh_in.get();
    p.call.y = mutable_data<float>(y);
    p.call.h_n = mutable_data<float>(h_n);
    p.call.c_n = lstm ? mutable_data<float>(c_n) : nullptr;
    p.ih = ih.get();
    p.hh = hh.get();
    p.hr = hr.get();
    const QuantizedKernels<W>& kernel = kernels().quantized<W>();
    const int threads = team_size(kernel.recurrence_threads(p.call.sizes, max_threads()));
    const Workspace<float> workspace(kernel.recurrence_workspace(p.call.sizes, threads));
    p.call.workspace = workspace.get();
    run_team(threads, [&](const ThreadTeam& team) { kernel.recurrence(p, team); });
    return {y, h_n, c_n};
  });
}

Tensor quantized_linear_forward(const Tensor& x, const Tensor& w, const OptionalTensor& scale, const OptionalTensor& b,
                                int64_t input, int64_t output) {
  constexpr const char* kOp = "quantized_linear_forward";
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float, kOp, ": x must be float32 on cpu");
  STD_TORCH_CHECK(input >= 0 && output >= 0 && output <= kMaxVolume, kOp, ": input and output must be from 0 to ",
                  kMaxVolume);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == input, kOp, ": x must have I = ", input, " features, got ",
                  shape_text(x));
  check_volume(x, kOp, "x");
  std::vector<int64_t> shape;
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    shape.push_back(x.size(i));
    rows *= x.size(i);
  }
  shape.push_back(output);
  return with_weight_type(w, kOp, [&](auto type) {
    using W = decltype(type);
    Packed<W> packed(w, "w", scale, "scale", kOp, 1, output, input, kInputDepth);
    const Input<float> b_in = float32_input(b, kOp, "b", {output});
    const Tensor x_in = dense(x);
    const Tensor y = empty(shape.data(), static_cast<int64_t>(shape.size()), ScalarType::Float);
    if (!any_elements(y)) return y;
    const LinearSizes sizes = {rows, input, output};
    const QuantizedKernels<W>& kernel = kernels().quantized<W>();
    const int threads = team_size(kernel.linear_threads(sizes, max_threads()));
    const Workspace<float> workspace(kernel.linear_workspace(sizes, threads));
    const QuantizedLinearParams<W> p = {sizes,      data<float>(x_in),      packed.get(),
                                        b_in.get(), mutable_data<float>(y), workspace.get()};
    run_team(threads, [&](const ThreadTeam& team) { kernel.linear(p, team); });
    return y;
  });
}

}  // namespace
}  // namespace llm_ext

STABLE_TORCH_LIBRARY_IMPL(llm_ext, CPU, m) {
  m.impl("quantized_rnn_forward", TORCH_BOX(&llm_ext::quantized_rnn_forward));
  m.impl("quantized_linear_forward", TORCH_BOX(&llm_ext::quantized_linear_forward));
}
