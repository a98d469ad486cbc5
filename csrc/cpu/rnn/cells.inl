// Cells: what one step does to its gates, forward and backward. The loop over time knows no cell.
//
// A cell works on vectors of units. Its pre-activations come in blocks: block b is the sum of the products of the input
// (if b < kGates), of the state (if b >= kBlocks - kGates) and of their biases. Before and after the loop each product
// is one matrix product, so the blocks of either side must be neighbours.
namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// The gate in the order of torch.nn that input block b, or state block b, belongs to.
template <typename C>
static constexpr int input_gate(int b) {
  return (b + C::kInputTurn) % C::kGates;
}
template <typename C>
static constexpr int state_gate(int b) {
  return b - (C::kBlocks - C::kGates);
}

// h = f(z). The derivative needs only the output: tanh' = 1 - h^2, relu' = (h > 0), sigmoid' = h (1 - h).
template <Mode kind>
struct Elman {
  static constexpr Mode kMode = kind;
  static constexpr int kGates = 1;
  static constexpr int kBlocks = 1;
  static constexpr int kInputTurn = 0;
  static constexpr bool kKeeps = false;       // the forward pass keeps its blocks for the backward pass
  static constexpr bool kReadsState = false;  // a step needs the state besides its product
  static constexpr bool kHasCell = false;     // there is a second state c
  static constexpr bool kCarries = false;     // gradients pass from step to step besides the product

  // Blocks in: pre-activations; out: what the backward pass needs. Returns h.
  template <typename T>
  static inline Vec<T> forward(Vec<T> (&z)[1], Vec<T>, Vec<T>&) {
    if constexpr (kind == Mode::kRnnTanh) return vec_tanh<T>(z[0]);
    if constexpr (kind == Mode::kRnnRelu) return z[0] < T(0) ? Vec<T>{} : z[0];  // in this order NaN stays NaN
    if constexpr (kind == Mode::kRnnSigmoid) return vec_sigmoid<T>(z[0]);
  }

  // Blocks in: what the forward pass saved; out: gradients of the pre-activations. `carry` passes from step to step.
  template <typename T>
  static inline void backward(Vec<T> (&z)[1], Vec<T> h, Vec<T>, Vec<T>, Vec<T>, Vec<T> dh, Vec<T>&) {
    if constexpr (kind == Mode::kRnnTanh) z[0] = dh * (T(1) - h * h);
    if constexpr (kind == Mode::kRnnRelu) z[0] = h > T(0) ? dh : Vec<T>{};
    if constexpr (kind == Mode::kRnnSigmoid) z[0] = dh * (h * (T(1) - h));
  }
};

// r = sigmoid(.), z = sigmoid(.), new = tanh(n + r m), h = (1 - z) new + z h_before, n from the input, m from the
// state.
struct Gru {
  static constexpr Mode kMode = Mode::kGru;
  static constexpr int kGates = 3;
  static constexpr int kBlocks = 4;     // n r z m, and new in place of n once it is known
  static constexpr int kInputTurn = 2;  // torch's order is r z n
  static constexpr bool kKeeps = true;
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
  static inline void backward(Vec<T> (&b)[4], Vec<T>, Vec<T> h_before, Vec<T>, Vec<T>, Vec<T> dh, Vec<T>& carry) {
    const Vec<T> fresh = b[0], r = b[1], z = b[2], m = b[3];
    dh += carry;
    carry = dh * z;
    const Vec<T> dn = (dh - carry) * (T(1) - fresh * fresh);
    b[0] = dn;
    b[1] = dn * m * (r * (T(1) - r));
    b[2] = dh * (h_before - fresh) * (z * (T(1) - z));
    b[3] = dn * r;
  }
};

// i, f, o = sigmoid(.), g = tanh(.), c = f c_before + i g, h = o tanh(c).
struct Lstm {
  static constexpr Mode kMode = Mode::kLstm;
  static constexpr int kGates = 4;
  static constexpr int kBlocks = 4;
  static constexpr int kInputTurn = 0;
  static constexpr bool kKeeps = true;
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
  static inline void backward(Vec<T> (&b)[4], Vec<T>, Vec<T>, Vec<T> c, Vec<T> c_before, Vec<T> dh, Vec<T>& carry) {
    const Vec<T> i = b[0], f = b[1], g = b[2], o = b[3];
    const Vec<T> squashed = vec_tanh<T>(c);
    const Vec<T> dc = carry + dh * o * (T(1) - squashed * squashed);
    carry = dc * f;
    b[0] = dc * g * (i * (T(1) - i));
    b[1] = dc * c_before * (f * (T(1) - f));
    b[2] = dc * i * (T(1) - g * g);
    b[3] = dh * squashed * (o * (T(1) - o));
  }
};

// Calls run(C{}) with the cell.
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

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
