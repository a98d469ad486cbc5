// The cells: the step of one unit of one row, forward and backward. The loops over time are the same for all cells.
// Formulas and names are those of csrc/cpu/rnn/cells.inl.
//
// Pre-activations come in blocks: block b is the sum of the products of the input (if b < kGates) and of the state (if
// b >= kBlocks - kGates), with their biases.
#pragma once

#include "cuda/device.cuh"
#include "params/rnn.h"

namespace llm_ext {
namespace cuda {

// The gate, in the order of torch.nn, of input block b and of state block b.
template <typename C>
LLM_EXT_DEVICE constexpr int input_gate(int b) {
  return (b + C::kInputTurn) % C::kGates;
}
template <typename C>
LLM_EXT_DEVICE constexpr int state_gate(int b) {
  return b - (C::kBlocks - C::kGates);
}

LLM_EXT_DEVICE float tanh_of(float x) {
  // x P(x^2) / Q(x^2), as in csrc/cpu/simd/vec_math.inl: relative error 4e-7, a dozen multiply-adds, no branch. For
  // |x| > 7.91, |tanh(x)| is within 2.8e-7 of 1. NaN stays NaN.
  constexpr float kClamp = 7.91f;
  x = x > kClamp ? kClamp : x;
  x = x < -kClamp ? -kClamp : x;
  const float y = x * x;
  float p = y * 1.5408448077424017e-8f + 2.2010607532402482e-5f;
  float q = y * 8.5912592159752765e-7f + 3.4224381183486759e-4f;
  p = p * y + 3.5782674990007407e-3f;
  q = q * y + 2.6189516140544143e-2f;
  p = p * y + 1.3450021178834871e-1f;
  q = q * y + 4.6783349118211935e-1f;
  p = p * y + 0.99999999428631413f;
  q = q * y + 1.0f;
  return quotient(x * p, q);
}

template <typename T>
LLM_EXT_DEVICE T sigmoid_of(T x) {
  return quotient(T(1), T(1) + exp_of(-x));
}

// h = f(z). The derivative depends on the output alone: tanh' = 1 - h^2, relu' = (h > 0), sigmoid' = h (1 - h). f is
// selected at run time without a branch, which avoids three copies of each kernel: sigmoid(z) = tanh(z / 2) / 2 + 1
// / 2.
struct Elman {
  static constexpr int kGates = 1;
  static constexpr int kBlocks = 1;
  static constexpr int kSaved = 0;  // blocks of saved activations, without an LSTM's output before its projection
  static constexpr int kInputTurn = 0;
  static constexpr bool kReadsState = false;  // a step needs the previous state besides its product
  static constexpr bool kHasCell = false;     // has a second state c
  static constexpr bool kCarries = false;     // backward: a gradient passes from step to step besides the product

  Mode mode;

  // Blocks in: pre-activations; out: saved activations. Returns h.
  template <typename T>
  LLM_EXT_DEVICE T forward(T (&z)[1], T, T&) const {
    const T scale = mode == Mode::kRnnSigmoid ? T(0.5) : T(1);
    const T shift = mode == Mode::kRnnSigmoid ? T(0.5) : T(0);
    const T squashed = scale * tanh_of(scale * z[0]) + shift;
    const T rectified = z[0] < T(0) ? T(0) : z[0];  // in this order NaN stays NaN
    return mode == Mode::kRnnRelu ? rectified : squashed;
  }

  // Blocks in: saved activations; out: gradients of the pre-activations. `carry` passes from step to step.
  template <typename T>
  LLM_EXT_DEVICE void backward(T (&z)[1], T h, T, T, T, T dh, T&) const {
    const T squashed = dh * ((mode == Mode::kRnnSigmoid ? h : T(1)) - h * h);
    const T rectified = h > T(0) ? dh : T(0);
    z[0] = mode == Mode::kRnnRelu ? rectified : squashed;
  }
};

// r = sigmoid(.), z = sigmoid(.), new = tanh(n + r m), h = (1 - z) new + z h_before; n comes from the input, m from the
// state. Blocks n r z m; `new` replaces n.
struct Gru {
  static constexpr int kGates = 3;
  static constexpr int kBlocks = 4;
  static constexpr int kSaved = 4;
  static constexpr int kInputTurn = 2;  // torch's order is r z n
  static constexpr bool kReadsState = true;
  static constexpr bool kHasCell = false;
  static constexpr bool kCarries = true;

  Mode mode;

  template <typename T>
  LLM_EXT_DEVICE T forward(T (&b)[4], T h_before, T&) const {
    b[1] = sigmoid_of(b[1]);
    b[2] = sigmoid_of(b[2]);
    b[0] = tanh_of(b[0] + b[1] * b[3]);
    return b[0] + b[2] * (h_before - b[0]);
  }

  template <typename T>
  LLM_EXT_DEVICE void backward(T (&b)[4], T, T h_before, T, T, T dh, T& carry) const {
    const T fresh = b[0], r = b[1], z = b[2], m = b[3];
    dh += carry;
    carry = dh * z;
    const T dn = (dh - carry) * (T(1) - fresh * fresh);
    b[0] = dn;
    b[1] = dn * m * (r * (T(1) - r));
    b[2] = dh * (h_before - fresh) * (z * (T(1) - z));
    b[3] = dn * r;
  }
};

// i, f, o = sigmoid(.), g = tanh(.), c = f c_before + i g, h = o tanh(c). Blocks i f g o; c is saved as a fifth.
struct Lstm {
  static constexpr int kGates = 4;
  static constexpr int kBlocks = 4;
  static constexpr int kSaved = 5;
  static constexpr int kInputTurn = 0;
  static constexpr bool kReadsState = false;
  static constexpr bool kHasCell = true;
  static constexpr bool kCarries = true;

  Mode mode;

  template <typename T>
  LLM_EXT_DEVICE T forward(T (&b)[4], T, T& c) const {
    b[0] = sigmoid_of(b[0]);
    b[1] = sigmoid_of(b[1]);
    b[2] = tanh_of(b[2]);
    b[3] = sigmoid_of(b[3]);
    c = b[1] * c + b[0] * b[2];
    return b[3] * tanh_of(c);
  }

  template <typename T>
  LLM_EXT_DEVICE void backward(T (&b)[4], T, T, T c, T c_before, T dh, T& carry) const {
    const T i = b[0], f = b[1], g = b[2], o = b[3];
    const T squashed = tanh_of(c);
    const T dc = carry + dh * o * (T(1) - squashed * squashed);
    carry = dc * f;
    b[0] = dc * g * (i * (T(1) - i));
    b[1] = dc * c_before * (f * (T(1) - f));
    b[2] = dc * i * (T(1) - g * g);
    b[3] = dh * squashed * (o * (T(1) - o));
  }
};

// Calls run(C{}) with the cell of a mode, on the host.
template <typename Run>
int with_cell(Mode mode, Run run) {
  switch (mode) {
    case Mode::kGru:
      return run(Gru{mode});
    case Mode::kLstm:
      return run(Lstm{mode});
    default:
      return run(Elman{mode});
  }
}

}  // namespace cuda
}  // namespace llm_ext
