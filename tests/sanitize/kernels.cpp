// Every kernel, of every type, on arrays of exactly the size that its contract names, by teams of 1 to 4 threads. The
// sanitizers find what is read or written beside them, and what two threads of a team do at once.
#include "cpu/kernels.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/isa/isa.h"
#include "torch/threads/run_team.h"

namespace llm_ext {

// With the kernels of one level alone: isa/dispatch.cpp refers to all of them.
#ifdef LLM_EXT_LEVEL
const Kernels& kernels() {
  static const Kernels all = [] {
    Kernels level = LLM_EXT_LEVEL;
    level.quantizeds = LLM_EXT_QUANTIZED;
    return level;
  }();
  return all;
}
#endif

namespace {

std::mt19937 generator;

int64_t one_of(std::initializer_list<int64_t> sizes) { return *(sizes.begin() + generator() % sizes.size()); }
bool flag() { return generator() % 2 == 1; }

template <typename S>
S random_number() {
  const float x = static_cast<float>(generator() % 2000) / 1000 - 1;
  if constexpr (std::is_same_v<S, BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return {static_cast<uint16_t>(bits >> 16)};
  } else if constexpr (std::is_same_v<S, Float16>) {
    return {static_cast<uint16_t>(0x3000 | (generator() & 0x83ff))};  // 0.125 to 0.25, of either sign
  } else if constexpr (std::is_same_v<S, int8_t>) {
    return static_cast<int8_t>(static_cast<int>(generator() % 255) - 127);
  } else {
    return static_cast<S>(x);
  }
}

// The arrays of one call.
class Arrays {
 public:
  template <typename T>
  T* out(int64_t elements) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, elements * sizeof(T)) != 0) std::abort();
    all_.emplace_back(memory, &std::free);
    std::memset(memory, 0xff, elements * sizeof(T));
    return static_cast<T*>(memory);
  }
  template <typename T>
  T* out_or_null(int64_t elements) {
    return flag() ? out<T>(elements) : nullptr;
  }
  template <typename S>
  const S* in(int64_t elements) {
    S* array = out<S>(elements);
    for (int64_t i = 0; i < elements; ++i) array[i] = random_number<S>();
    return array;
  }
  template <typename S>
  const S* in_or_null(int64_t elements) {
    return flag() ? in<S>(elements) : nullptr;
  }
  const int64_t* numbers(const std::vector<int64_t>& values) {
    int64_t* array = out<int64_t>(static_cast<int64_t>(values.size()));
    std::copy(values.begin(), values.end(), array);
    return array;
  }
  const int64_t* lengths(int64_t count, int64_t most) {
    std::vector<int64_t> values(count);
    for (int64_t& value : values) value = generator() % (most + 1);
    return numbers(values);
  }
  const bool* mask(int64_t count) {
    bool* array = out<bool>(count);
    for (int64_t i = 0; i < count; ++i) array[i] = flag();
    return array;
  }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> all_;
};

template <typename Kernel, typename Params>
void run(Kernel kernel, const Params& params, int threads) {
  run_team(threads, [&](const ThreadTeam& team) { kernel(params, team); });
}

RecurrenceSizes recurrence_sizes(Arrays& a) {
  RecurrenceSizes s = {};
  s.mode = static_cast<Mode>(generator() % 5);
  s.steps = one_of({1, 2, 5, 9});
  s.batch = one_of({1, 2, 5, 17, 40});
  s.input = one_of({0, 1, 7, 33});
  s.hidden = one_of({1, 3, 8, 17, 33, 70});
  s.output = s.mode == Mode::kLstm && s.hidden > 2 && flag() ? s.hidden / 2 : s.hidden;
  s.reverse = flag();
  std::vector<int64_t> offsets = {0};
  int64_t rows = s.batch;
  const bool packed = flag();
  for (int64_t t = 0; t < s.steps; ++t) {
    offsets.push_back(offsets.back() + rows);
    if (packed) rows = 1 + static_cast<int64_t>(generator()) % rows;
  }
  s.row_offsets = a.numbers(offsets);
  return s;
}

template <typename S>
void recurrence(int threads) {
  using T = Compute<S>;
  Arrays a;
  const RecurrenceSizes s = recurrence_sizes(a);
  const int64_t N = s.row_offsets[s.steps], H = s.hidden, P = s.output, gates = gates_of(s.mode) * H;
  const bool lstm = s.mode == Mode::kLstm;
  const int64_t saved = saved_blocks(s.mode, s.projected()) * H;
  const RecurrenceKernels<S>& kernel = std::get<RecurrenceKernels<S>>(kernels().recurrences);
  threads = kernel.threads(s, threads);

  RecurrenceForwardParams<S> p = {};
  p.sizes = s;
  p.x = a.in<S>(N * s.input);
  p.h0 = a.in_or_null<S>(s.batch * P);
  p.c0 = lstm && p.h0 != nullptr ? a.in<S>(s.batch * H) : nullptr;
  p.w_ih = a.in<S>(gates * s.input);
  p.w_hh = a.in<S>(gates * P);
  p.b_ih = a.in_or_null<S>(gates);
  p.b_hh = a.in_or_null<S>(gates);
  p.w_hr = s.projected() ? a.in<S>(P * H) : nullptr;
  S* const y = a.out<S>(N * P);
  S* const all_saved = saved > 0 ? a.out<S>(N * saved) : nullptr;
  p.y = y;
  p.h_n = a.out<S>(s.batch * P);
  p.c_n = lstm ? a.out<S>(s.batch * H) : nullptr;
  p.saved = all_saved;
  p.workspace = a.out<T>(kernel.forward_workspace(s, threads));
  const int64_t bytes = kernel.packed_size(s);
  if (bytes > 0) {
    void* const weights = a.out<uint8_t>(bytes);
    run_team(threads, [&](const ThreadTeam& team) { kernel.pack(p, weights, team); });
    p.packed = weights;
  }
  run(kernel.forward, p, threads);

  RecurrenceBackwardParams<S> b = {};
  b.sizes = s;
  b.grad_y = a.in_or_null<S>(N * P);
  b.grad_h_n = a.in_or_null<S>(s.batch * P);
  b.grad_c_n = lstm ? a.in_or_null<S>(s.batch * H) : nullptr;
  b.x = p.x;
  b.h0 = p.h0;
  b.c0 = p.c0;
  b.w_ih = p.w_ih;
  b.w_hh = p.w_hh;
  b.w_hr = p.w_hr;
  b.y = y;
  b.saved = all_saved;
  b.dx = a.out_or_null<S>(N * s.input);
  b.dh0 = p.h0 != nullptr ? a.out_or_null<S>(s.batch * P) : nullptr;
  b.dc0 = p.c0 != nullptr ? a.out_or_null<S>(s.batch * H) : nullptr;
  b.dw_ih = a.out_or_null<S>(gates * s.input);
  b.dw_hh = a.out_or_null<S>(gates * P);
  b.dw_hr = s.projected() ? a.out_or_null<S>(P * H) : nullptr;
  b.db_ih = a.out_or_null<S>(gates);
  b.db_hh = a.out_or_null<S>(gates);
  b.workspace = a.out<T>(kernel.backward_workspace(s, threads));
  run(kernel.backward, b, threads);

  if constexpr (std::is_same_v<S, T>) {
    const LinearizedRecurrenceKernels<S>& derivatives =
        std::get<LinearizedRecurrenceKernels<S>>(kernels().linearized_recurrences);
    LinearizedRecurrence<S> at = {
        s, a.in<S>(s.batch * P), lstm ? a.in<S>(s.batch * H) : nullptr, p.w_hh, p.w_hr, y, all_saved};
    at.sizes.input = 0;
    const int64_t blocks = blocks_of(s.mode) * H;
    const int size = derivatives.threads(at.sizes, threads);
    RecurrenceTangentParams<S> tangent = {};
    tangent.at = at;
    tangent.v_a = a.in_or_null<S>(N * blocks);
    tangent.v_h = a.in_or_null<S>(N * P);
    tangent.v_c = lstm ? a.in_or_null<S>(N * H) : nullptr;
    tangent.h0 = a.in_or_null<S>(s.batch * P);
    tangent.c0 = lstm ? a.in_or_null<S>(s.batch * H) : nullptr;
    tangent.a = a.out<S>(N * blocks);
    tangent.h = a.out<S>(N * P);
    tangent.c = lstm ? a.out<S>(N * H) : nullptr;
    tangent.workspace = a.out<S>(derivatives.tangent_workspace(at.sizes));
    run(derivatives.tangent, tangent, size);
    RecurrenceAdjointParams<S> adjoint = {};
    adjoint.at = at;
    adjoint.g_a = a.in_or_null<S>(N * blocks);
    adjoint.g_h = a.in_or_null<S>(N * P);
    adjoint.g_c = lstm ? a.in_or_null<S>(N * H) : nullptr;
    adjoint.g_saved = saved > 0 ? a.in_or_null<S>(N * saved) : nullptr;
    adjoint.a = a.out<S>(N * blocks);
    adjoint.h = a.out<S>(N * P);
    adjoint.c = lstm ? a.out<S>(N * H) : nullptr;
    adjoint.dh0 = a.out<S>(s.batch * P);
    adjoint.dc0 = lstm ? a.out<S>(s.batch * H) : nullptr;
    adjoint.workspace = a.out<S>(derivatives.adjoint_workspace(at.sizes));
    run(derivatives.adjoint, adjoint, size);
  }
}

template <typename S>
void linear(int threads) {
  Arrays a;
  const LinearSizes s = {one_of({0, 1, 2, 7, 25, 70}), one_of({0, 1, 5, 17, 64}), one_of({1, 3, 17, 50})};
  const LinearKernels<S>& kernel = std::get<LinearKernels<S>>(kernels().linears);
  threads = kernel.threads(s, threads);
  const S *x = a.in<S>(s.rows * s.input), *w = a.in<S>(s.output * s.input), *b = a.in_or_null<S>(s.output);
  run(kernel.forward,
      LinearForwardParams<S>{s, x, w, b, a.in_or_null<S>(s.rows * s.output), flag(), a.out<S>(s.rows * s.output),
                             a.out<S>(kernel.forward_workspace(s))},
      threads);
  run(kernel.argmax,
      LinearArgmaxParams<S>{s, x, w, b, a.out<int64_t>(s.rows), a.out<S>(kernel.argmax_workspace(s, threads))},
      threads);
  run(kernel.backward,
      LinearBackwardParams<S>{s, a.in<S>(s.rows * s.output), x, w, a.out_or_null<S>(s.rows * s.input),
                              a.out_or_null<S>(s.output * s.input), a.out_or_null<S>(s.output),
                              a.out<S>(kernel.backward_workspace(s, threads))},
      threads);
}

template <typename W>
QuantizedMatrix<W> packed(Arrays& a, int64_t blocks, int64_t rows, int64_t columns, int64_t depth) {
  const int64_t units = (columns + depth - 1) / depth + (depth == 4 ? 1 : 0);
  const int64_t panels = (rows + kQuantizedPanel - 1) / kQuantizedPanel;
  return {a.in<W>(panels * blocks * units * kQuantizedPanel * depth),
          sizeof(W) == 1 ? a.in<float>(blocks * rows) : nullptr};
}

template <typename W>
void quantized(int threads) {
  Arrays a;
  const RecurrenceSizes s = recurrence_sizes(a);
  const int64_t N = s.row_offsets[s.steps], H = s.hidden, P = s.output, gates = gates_of(s.mode);
  const bool lstm = s.mode == Mode::kLstm;
  const QuantizedKernels<W>& kernel = std::get<QuantizedKernels<W>>(kernels().quantizeds);
  const int size = kernel.recurrence_threads(s, threads);
  QuantizedRecurrenceParams<W> p = {};
  p.call.sizes = s;
  p.call.x = a.in<float>(N * s.input);
  p.call.h0 = a.in_or_null<float>(s.batch * P);
  p.call.c0 = lstm && p.call.h0 != nullptr ? a.in<float>(s.batch * H) : nullptr;
  p.call.b_ih = a.in_or_null<float>(gates * H);
  p.call.b_hh = a.in_or_null<float>(gates * H);
  p.call.y = a.out<float>(N * P);
  p.call.h_n = a.out<float>(s.batch * P);
  p.call.c_n = lstm ? a.out<float>(s.batch * H) : nullptr;
  p.call.workspace = a.out<float>(kernel.recurrence_workspace(s, size));
  p.ih = packed<W>(a, gates, H, s.input, kInputDepth);
  p.hh = packed<W>(a, gates, H, P, kStateDepth<W>);
  if (s.projected()) p.hr = packed<W>(a, 1, P, H, kStateDepth<W>);
  run(kernel.recurrence, p, size);

  const LinearSizes l = {one_of({0, 1, 2, 7, 25, 70}), one_of({1, 5, 17, 64}), one_of({1, 3, 17, 50})};
  const int team = kernel.linear_threads(l, threads);
  run(kernel.linear,
      QuantizedLinearParams<W>{l, a.in<float>(l.rows * l.input), packed<W>(a, 1, l.output, l.input, kInputDepth),
                               a.in_or_null<float>(l.output), a.out<float>(l.rows * l.output),
                               a.out<float>(kernel.linear_workspace(l, team))},
      team);
}

template <typename S>
void pool(int threads) {
  using T = Compute<S>;
  Arrays a;
  PoolInput<S> in = {};
  in.batch = one_of({0, 1, 2, 5});
  in.steps = one_of({0, 1, 7, 8, 9, 40, 300});
  in.dim = one_of({0, 1, 5, 16, 33, 130});
  const int64_t B = in.batch, steps = in.steps, D = in.dim, all = B * steps * D;
  const bool time_major = flag();
  in.e = a.in<S>(all);
  in.e_batch_stride = time_major ? D : steps * D;
  in.e_step_stride = time_major ? B * D : D;
  const bool folded = flag();
  in.u = folded ? a.in<S>(D) : nullptr;
  in.scores = folded ? nullptr : a.in<S>(B * steps);
  in.lengths = flag() ? a.lengths(B, steps) : nullptr;
  in.mask = flag() ? a.mask(B * steps) : nullptr;
  const PoolKernels<S>& kernel = std::get<PoolKernels<S>>(kernels().pools);
  threads = flag() ? kernel.threads(in, threads) : threads;
  S* const c = a.out<S>(B * D);
  auto* const l = a.out<LogSum<T>>(B);
  run(kernel.forward, PoolForwardParams<S>{in, c, a.out<T>(B), l, a.out<T>(kernel.workspace(in, threads))}, threads);
  run(kernel.backward,
      PoolBackwardParams<S>{in, c, l, a.in_or_null<S>(B * D), a.in_or_null<T>(B), a.out_or_null<S>(all),
                            folded ? a.out_or_null<S>(D) : nullptr, folded ? nullptr : a.out_or_null<S>(B * steps),
                            a.out<T>(kernel.workspace(in, threads))},
      threads);
  LogSum<T>* l0 = flag() ? a.out<LogSum<T>>(B) : nullptr;
  for (int64_t b = 0; l0 != nullptr && b < B; ++b) l0[b] = {T(0.5), T(1.5)};
  const T* const c0 = l0 == nullptr ? nullptr : a.in<T>(B * D);
  S* const states = a.out<S>(all);
  T* const share = a.out<T>(B * steps);
  run(kernel.prefix_forward,
      PrefixPoolForwardParams<S>{in, l0, c0, states, share, a.out<LogSum<T>>(B), a.out<T>(B * D),
                                 a.out<T>(kernel.prefix_workspace(in, threads))},
      threads);
  run(kernel.prefix_backward,
      PrefixPoolBackwardParams<S>{in, c0, states, share, a.in_or_null<S>(all), a.in_or_null<T>(B),
                                  a.in_or_null<T>(B * D), a.out_or_null<S>(all), a.out_or_null<S>(D),
                                  a.out_or_null<S>(B * steps), a.out_or_null<T>(B), a.out_or_null<T>(B * D),
                                  a.out<T>(kernel.prefix_workspace(in, threads))},
      threads);
}

template <typename S>
void attention(int threads) {
  using T = Compute<S>;
  Arrays a;
  AdditiveAttentionInput<S> in = {};
  in.batch = one_of({0, 1, 2, 3});
  in.queries = one_of({0, 1, 3, 17});
  in.keys = one_of({0, 1, 5, 18});
  in.attn_dim = one_of({0, 1, 9, 33});
  in.value_dim = one_of({0, 1, 5, 40});
  const int64_t B = in.batch, Tq = in.queries, Tk = in.keys, A = in.attn_dim, Dv = in.value_dim;
  in.query = a.in<S>(B * Tq * A);
  in.key = a.in<S>(B * Tk * A);
  in.v = a.in<S>(A);
  in.values = a.in<S>(B * Tk * Dv);
  in.key_lengths = flag() ? a.lengths(B, Tk) : nullptr;
  if (flag()) {
    const bool by_query = flag();
    in.mask = a.mask(B * Tk * (by_query ? Tq : 1));
    in.mask_batch_stride = by_query ? Tq * Tk : Tk;
    in.mask_query_stride = by_query ? Tk : 0;
  }
  const AdditiveAttentionKernels<S>& kernel = std::get<AdditiveAttentionKernels<S>>(kernels().additive_attentions);
  threads = flag() ? kernel.threads(in, threads) : threads;
  run(kernel.forward,
      AdditiveAttentionForwardParams<S>{in, a.out<S>(B * Tq * Dv), a.out_or_null<S>(B * Tq * Tk),
                                        a.out<T>(kernel.forward_workspace(in, threads))},
      threads);
  run(kernel.backward,
      AdditiveAttentionBackwardParams<S>{in, a.in_or_null<S>(B * Tq * Dv), a.in_or_null<S>(B * Tq * Tk),
                                         a.out_or_null<S>(B * Tq * A), a.out_or_null<S>(B * Tk * A),
                                         a.out_or_null<S>(A), a.out_or_null<S>(B * Tk * Dv),
                                         a.out<T>(kernel.backward_workspace(in, threads))},
      threads);
}

template <typename S>
void every_kernel(int threads) {
  recurrence<S>(threads);
  pool<S>(threads);
  attention<S>(threads);
  if constexpr (std::is_same_v<S, Compute<S>>) linear<S>(threads);
}

}  // namespace
}  // namespace llm_ext

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::stoi(arguments[1]) : 100;
  for (int i = 0; i < rounds; ++i) {
    llm_ext::generator.seed(i);
    const int threads = 1 + i % 4;
    llm_ext::every_kernel<float>(threads);
    llm_ext::every_kernel<double>(threads);
    llm_ext::every_kernel<llm_ext::BFloat16>(threads);
    llm_ext::every_kernel<llm_ext::Float16>(threads);
    llm_ext::quantized<int8_t>(threads);
    llm_ext::quantized<llm_ext::BFloat16>(threads);
  }
  std::printf("kernels: %s, %d rounds of every kernel and type\n", llm_ext::kernels().isa, rounds);
}
