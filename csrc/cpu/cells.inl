// Cells: what one step does to its gates, forward and backward. The loop over time knows no cell.
namespace llm_ext {
namespace LLM_EXT_LEVEL {

// h = f(z). The derivative needs only the output: tanh' = 1 - h^2, relu' = (h > 0), sigmoid' = h (1 - h).
template <Nonlinearity kind>
struct Elman {
  template <typename T>
  static inline Vec<T> activate(Vec<T> z) {
    if constexpr (kind == Nonlinearity::kTanh) return vec_tanh<T>(z);
    if constexpr (kind == Nonlinearity::kRelu) return z < T(0) ? Vec<T>{} : z;  // in this order NaN stays NaN
    if constexpr (kind == Nonlinearity::kSigmoid) return vec_sigmoid<T>(z);
  }

  // Gradient of z from the gradient of h.
  template <typename T>
  static inline Vec<T> gate_gradient(Vec<T> dh, Vec<T> h) {
    if constexpr (kind == Nonlinearity::kTanh) return dh * (T(1) - h * h);
    if constexpr (kind == Nonlinearity::kRelu) return h > T(0) ? dh : Vec<T>{};
    if constexpr (kind == Nonlinearity::kSigmoid) return dh * (h * (T(1) - h));
  }
};

}  // namespace LLM_EXT_LEVEL
}  // namespace llm_ext
