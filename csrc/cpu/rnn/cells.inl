// Cells: the elementwise step of Elman, GRU and LSTM, forward and backward. The loop over time is generic over them.
//
// A cell works on vectors of units. Its pre-activations come in blocks of H: block b adds W_ih x (if b < kGates),
// W_hh h (if b >= kBlocks - kGates) and their biases. The blocks of either product are adjacent, because outside the
// loop each product is one matrix product.
#pragma once

#include "cpu/gemm/packing.inl"
#include "cpu/isa/isa.h"
#include "cpu/simd/vec.inl"
#include "cpu/simd/vec_math.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// The gate, in the order of torch.nn, of block b of the input product and of the state product.
template <typename C>
static constexpr int input_gate(int b) {
  return (b + C::kInputRotation) % C::kGates;
}
template <typename C>
static constexpr int state_gate(int b) {
  return b - (C::kBlocks - C::kGates);
}

// h = f(z). The derivative needs only the output: tanh' = 1 - h^2, relu' = (h > 0), sigmoid' = h (1 - h).
template <Mode mode>
struct Elman {
  static constexpr Mode kMode = mode;
  static constexpr int kGates = 1;
  static constexpr int kBlocks = 1;
  static constexpr int kInputRotation = 0;
  static constexpr bool kSavesBlocks = false;  // the backward pass needs the blocks of the forward pass
  static constexpr bool kReadsState = false;   // a step reads h_{t-1} itself, besides its product
  static constexpr bool kHasCell = false;      // there is a cell state c
  static constexpr bool kCarries = false;      // a gradient passes from step to step besides the product

  // z: pre-activations in, saved activations out. Returns h.
  template <typename T>
  static inline Vec<T> forward(Vec<T> (&z)[1], Vec<T>, Vec<T>&) {
    if constexpr (mode == Mode::kRnnTanh) return vec_tanh<T>(z[0]);
    if constexpr (mode == Mode::kRnnRelu) return z[0] < T(0) ? Vec<T>{} : z[0];  // written so that NaN stays NaN
    if constexpr (mode == Mode::kRnnSigmoid) return vec_sigmoid<T>(z[0]);
  }

  // z: saved activations in, gradients of the pre-activations out. `carry` is read and replaced at each step. `state`
  // gets the complete gradient of the state itself: of h, or of c in an LSTM.
  template <typename T>
  static inline void backward(Vec<T> (&z)[1], Vec<T> h, Vec<T>, Vec<T>, Vec<T>, Vec<T> dh, Vec<T>&, Vec<T>& state) {
    state = dh;
    if constexpr (mode == Mode::kRnnTanh) z[0] = dh * (T(1) - h * h);
    if constexpr (mode == Mode::kRnnRelu) z[0] = h > T(0) ? dh : Vec<T>{};
    if constexpr (mode == Mode::kRnnSigmoid) z[0] = dh * (h * (T(1) - h));
  }

  // z: saved activations. a: tangents of the pre-activations. dh_before: tangent of the state before. dc: tangent of
  // the cell state, before in and after out, to which v_c is added. Returns the tangent of h.
  template <typename T>
  static inline Vec<T> tangent(const Vec<T> (&)[1], Vec<T> h, Vec<T>, Vec<T>, Vec<T>, const Vec<T> (&a)[1], Vec<T>,
                               Vec<T>&, Vec<T>) {
    if constexpr (mode == Mode::kRnnTanh) return a[0] * (T(1) - h * h);
    if constexpr (mode == Mode::kRnnRelu) return h > T(0) ? a[0] : Vec<T>{};
    if constexpr (mode == Mode::kRnnSigmoid) return a[0] * (h * (T(1) - h));
  }

  // Gradients of <adjoint, tangent> by the activations, where `adjoint` are the adjoints of h (before a projection) and
  // of c. z: saved activations. a: tangents of the pre-activations. before: tangent of the state before (of the cell
  // state in an LSTM). dc: tangent of the cell state. d: gradients of z, out. Returns the gradient of the state (of the
  // cell state in an LSTM); d_before gets that of the state before.
  template <typename T>
  static inline Vec<T> curvature(const Vec<T> (&)[1], Vec<T> h, Vec<T>, Vec<T>, Vec<T>, const Vec<T> (&a)[1], Vec<T>,
                                 Vec<T>, Vec<T> adjoint, Vec<T>, Vec<T> (&)[1], Vec<T>&) {
    if constexpr (mode == Mode::kRnnTanh) return T(-2) * adjoint * a[0] * h;
    if constexpr (mode == Mode::kRnnRelu) return Vec<T>{};
    if constexpr (mode == Mode::kRnnSigmoid) return adjoint * a[0] * (T(1) - T(2) * h);
  }

  // Adds to `da`, the gradients of the pre-activations, those that come from gradients `d` of the saved activations z.
  template <typename T>
  static inline void activation_backward(const Vec<T> (&)[1], const Vec<T> (&)[1], Vec<T> (&)[1]) {}
};

// r, z = sigmoid(.), new = tanh(n + r m), h = (1 - z) new + z h_before. n comes from the input, m from the state.
struct Gru {
  static constexpr Mode kMode = Mode::kGru;
  static constexpr int kGates = 3;
  static constexpr int kBlocks = 4;         // n r z m; new replaces n
  static constexpr int kInputRotation = 2;  // torch's order is r z n
  static constexpr bool kSavesBlocks = true;
  static constexpr bool kReadsState = true;
  static constexpr bool kHasCell = false;
  static constexpr bool kCarries = true;

  template <typename T>
  static inline Vec<T> forward(Vec<T> (&b)[4], Vec<T> h_before, Vec<T>&) {
    b[1] = vec_sigmoid<T>(b[1]);
    b[2] = vec_sigmoid<T>(b[2]);
    b[0] = vec_tanh<T>(b[0] + b[1] * b[3]);
    return b[0] + b[2] * (h_before - b[0]);
  }

  template <typename T>
  static inline void backward(Vec<T> (&b)[4], Vec<T>, Vec<T> h_before, Vec<T>, Vec<T>, Vec<T> dh, Vec<T>& carry,
                              Vec<T>& state) {
    const Vec<T> new_gate = b[0], r = b[1], z = b[2], m = b[3];
    dh += carry;
    state = dh;
    carry = dh * z;
    const Vec<T> dn = (dh - carry) * (T(1) - new_gate * new_gate);
    b[0] = dn;
    b[1] = dn * m * (r * (T(1) - r));
    b[2] = dh * (h_before - new_gate) * (z * (T(1) - z));
    b[3] = dn * r;
  }

  template <typename T>
  static inline Vec<T> tangent(const Vec<T> (&b)[4], Vec<T>, Vec<T> h_before, Vec<T>, Vec<T>, const Vec<T> (&a)[4],
                               Vec<T> dh_before, Vec<T>&, Vec<T>) {
    const Vec<T> new_gate = b[0], r = b[1], z = b[2], m = b[3];
    const Vec<T> d_new = (T(1) - new_gate * new_gate) * (a[0] + a[1] * (r * (T(1) - r)) * m + a[3] * r);
    return d_new + z * (dh_before - d_new) + a[2] * (z * (T(1) - z)) * (h_before - new_gate);
  }

  template <typename T>
  static inline Vec<T> curvature(const Vec<T> (&b)[4], Vec<T>, Vec<T> h_before, Vec<T>, Vec<T>, const Vec<T> (&a)[4],
                                 Vec<T> before, Vec<T>, Vec<T> adjoint, Vec<T>, Vec<T> (&d)[4], Vec<T>& d_before) {
    const Vec<T> new_gate = b[0], r = b[1], z = b[2], m = b[3];
    const Vec<T> slope = T(1) - new_gate * new_gate, slope_r = r * (T(1) - r), slope_z = z * (T(1) - z);
    const Vec<T> inner = a[0] + a[1] * slope_r * m + a[3] * r;
    const Vec<T> d_inner = adjoint * (T(1) - z) * slope;
    d[0] = T(-2) * adjoint * (T(1) - z) * new_gate * inner - adjoint * a[2] * slope_z;
    d[1] = d_inner * (a[1] * (T(1) - T(2) * r) * m + a[3]);
    d[2] = adjoint * (before - slope * inner + a[2] * (T(1) - T(2) * z) * (h_before - new_gate));
    d[3] = d_inner * a[1] * slope_r;
    d_before = adjoint * a[2] * slope_z;
    return Vec<T>{};
  }

  template <typename T>
  static inline void activation_backward(const Vec<T> (&b)[4], const Vec<T> (&d)[4], Vec<T> (&da)[4]) {
    const Vec<T> new_gate = b[0], r = b[1], z = b[2], m = b[3];
    const Vec<T> d_inner = d[0] * (T(1) - new_gate * new_gate);
    da[0] += d_inner;
    da[1] += (d[1] + d_inner * m) * (r * (T(1) - r));
    da[2] += d[2] * (z * (T(1) - z));
    da[3] += d[3] + d_inner * r;
  }
};

// i, f, o = sigmoid(.), g = tanh(.), c = f c_before + i g, h = o tanh(c).
struct Lstm {
  static constexpr Mode kMode = Mode::kLstm;
  static constexpr int kGates = 4;
  static constexpr int kBlocks = 4;
  static constexpr int kInputRotation = 0;
  static constexpr bool kSavesBlocks = true;
  static constexpr bool kReadsState = false;
  static constexpr bool kHasCell = true;
  static constexpr bool kCarries = true;

  template <typename T>
  static inline Vec<T> forward(Vec<T> (&b)[4], Vec<T>, Vec<T>& c) {
    b[0] = vec_sigmoid<T>(b[0]);
    b[1] = vec_sigmoid<T>(b[1]);
    b[2] = vec_tanh<T>(b[2]);
    b[3] = vec_sigmoid<T>(b[3]);
    c = b[1] * c + b[0] * b[2];
    return b[3] * vec_tanh<T>(c);
  }

  template <typename T>
  static inline void backward(Vec<T> (&b)[4], Vec<T>, Vec<T>, Vec<T> c, Vec<T> c_before, Vec<T> dh, Vec<T>& carry,
                              Vec<T>& state) {
    const Vec<T> i = b[0], f = b[1], g = b[2], o = b[3];
    const Vec<T> tanh_c = vec_tanh<T>(c);
    const Vec<T> dc = carry + dh * o * (T(1) - tanh_c * tanh_c);
    state = dc;
    carry = dc * f;
    b[0] = dc * g * (i * (T(1) - i));
    b[1] = dc * c_before * (f * (T(1) - f));
    b[2] = dc * i * (T(1) - g * g);
    b[3] = dh * tanh_c * (o * (T(1) - o));
  }

  template <typename T>
  static inline Vec<T> tangent(const Vec<T> (&b)[4], Vec<T>, Vec<T>, Vec<T> c, Vec<T> c_before, const Vec<T> (&a)[4],
                               Vec<T>, Vec<T>& dc, Vec<T> v_c) {
    const Vec<T> i = b[0], f = b[1], g = b[2], o = b[3];
    const Vec<T> tanh_c = vec_tanh<T>(c);
    dc = v_c + f * dc + a[0] * (i * (T(1) - i)) * g + a[1] * (f * (T(1) - f)) * c_before + a[2] * (T(1) - g * g) * i;
    return dc * (o * (T(1) - tanh_c * tanh_c)) + a[3] * (o * (T(1) - o)) * tanh_c;
  }

  template <typename T>
  static inline Vec<T> curvature(const Vec<T> (&b)[4], Vec<T>, Vec<T>, Vec<T> c, Vec<T> c_before, const Vec<T> (&a)[4],
                                 Vec<T> before, Vec<T> dc, Vec<T> adjoint, Vec<T> adjoint_c, Vec<T> (&d)[4],
                                 Vec<T>& d_before) {
    const Vec<T> i = b[0], f = b[1], g = b[2], o = b[3];
    const Vec<T> tanh_c = vec_tanh<T>(c);
    const Vec<T> slope_c = T(1) - tanh_c * tanh_c, slope_g = T(1) - g * g;
    d[0] = adjoint_c * (a[0] * (T(1) - T(2) * i) * g + a[2] * slope_g);
    d[1] = adjoint_c * (before + a[1] * (T(1) - T(2) * f) * c_before);
    d[2] = adjoint_c * (a[0] * (i * (T(1) - i)) - T(2) * a[2] * i * g);
    d[3] = adjoint * (dc * slope_c + a[3] * (T(1) - T(2) * o) * tanh_c);
    d_before = adjoint_c * a[1] * (f * (T(1) - f));
    return adjoint * slope_c * (a[3] * (o * (T(1) - o)) - T(2) * tanh_c * o * dc);
  }

  template <typename T>
  static inline void activation_backward(const Vec<T> (&b)[4], const Vec<T> (&d)[4], Vec<T> (&da)[4]) {
    const Vec<T> i = b[0], f = b[1], g = b[2], o = b[3];
    da[0] += d[0] * (i * (T(1) - i));
    da[1] += d[1] * (f * (T(1) - f));
    da[2] += d[2] * (T(1) - g * g);
    da[3] += d[3] * (o * (T(1) - o));
  }
};

// Calls run(C{}) with the cell of `mode`.
template <typename Run>
static inline auto with_cell(Mode mode, Run run) {
  switch (mode) {
    case Mode::kRnnTanh:
      return run(Elman<Mode::kRnnTanh>{});
    case Mode::kRnnRelu:
      return run(Elman<Mode::kRnnRelu>{});
    case Mode::kRnnSigmoid:
      return run(Elman<Mode::kRnnSigmoid>{});
    case Mode::kGru:
      return run(Gru{});
    default:
      return run(Lstm{});
  }
}

// W_ih [G H, I] with its gates in the order of the blocks.
template <typename S>
static inline WeightRows<S> input_weight_rows(const S* w_ih, const RecurrenceSizes& s) {
  const int rotation = with_cell(s.mode, [](auto cell) { return decltype(cell)::kInputRotation; });
  return {w_ih, s.input, gates_of(s.mode) * s.hidden, rotation * s.hidden};
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
