// The kernels of int8 weights of every ISA that this machine supports, with and without VNNI, give the same bits.
// LLM_EXT_ISA selects only the best of each vector size.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa/isa.h"
#include "cpu/kernels.h"
#include "torch/threads/run_team.h"

namespace llm_ext {
namespace {

std::mt19937 generator;

int64_t one_of(std::initializer_list<int64_t> sizes) { return *(sizes.begin() + generator() % sizes.size()); }
bool flag() { return generator() % 2 == 1; }

template <typename T>
T* allocate(int64_t elements, std::vector<std::unique_ptr<void, void (*)(void*)>>& all) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, elements * sizeof(T) + 1) != 0) std::abort();
  all.emplace_back(memory, &std::free);
  std::memset(memory, 0, elements * sizeof(T));
  return static_cast<T*>(memory);
}

class Arrays {
 public:
  const float* in(int64_t elements, float size = 1) {
    float* array = out(elements);
    for (int64_t i = 0; i < elements; ++i) array[i] = size * (static_cast<float>(generator() % 2001) / 1000 - 1);
    return array;
  }
  float* out(int64_t elements) { return allocate<float>(elements, all_); }
  // Random weights [blocks rows, columns], with the largest magnitudes more often than others.
  QuantizedMatrix<int8_t> packed(int64_t blocks, int64_t rows, int64_t columns, int64_t depth) {
    const int64_t panels = (rows + kQuantizedPanel - 1) / kQuantizedPanel, units = (columns + depth - 1) / depth;
    const int64_t first = depth == kByteDepth ? 1 : 0, unit = kQuantizedPanel * depth;
    int8_t* const values = allocate<int8_t>(panels * blocks * (units + first) * unit, all_);
    for (int64_t panel = 0; panel < panels * blocks; ++panel) {
      int8_t* const begin = values + panel * (units + first) * unit;
      for (int64_t row = 0; row < kQuantizedPanel; ++row) {
        int32_t sum = 0;
        for (int64_t k = 0; k < columns; ++k) {
          const int q = flag() ? static_cast<int>(generator() % 255) - 127 : flag() ? 127 : -127;
          begin[(first + k / depth) * unit + row * depth + k % depth] = static_cast<int8_t>(q);
          sum += q;
        }
        sum *= -kByteOffset;
        if (first != 0) std::memcpy(begin + row * depth, &sum, sizeof sum);
      }
    }
    return {values, in(blocks * rows, 1 / (127 * std::sqrt(static_cast<float>(columns + 1))))};
  }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> all_;
};

using Table = std::pair<const char*, const QuantizedKernels<int8_t>*>;

std::vector<Table> supported_tables() {
  const auto table = [](const char* name, const QuantizedTables& tables) {
    return Table{name, &std::get<QuantizedKernels<int8_t>>(tables)};
  };
  std::vector<Table> all = {table("baseline", baseline_quantized_kernels)};
#if LLM_EXT_X86_ISAS
  const std::string features = [] {
    std::string found;
    std::FILE* const file = std::fopen("/proc/cpuinfo", "r");
    for (int c; file != nullptr && (c = std::fgetc(file)) != EOF;) found += c == '\n' ? ' ' : static_cast<char>(c);
    if (file != nullptr) std::fclose(file);
    return found;
  }();
  const auto has = [&](const char* name) { return features.find(" " + std::string(name) + " ") != std::string::npos; };
  const bool avx2 = has("avx2") && has("fma") && has("f16c") && has("bmi2");
  const bool avx512 = avx2 && has("avx512f") && has("avx512bw") && has("avx512dq") && has("avx512vl");
  if (avx2) all.push_back(table("avx2", avx2_quantized_kernels));
  if (avx2 && has("avx_vnni")) all.push_back(table("avx_vnni", avx_vnni_quantized_kernels));
  if (avx512) all.push_back(table("avx512", avx512_quantized_kernels));
  if (avx512 && has("avx512_vnni")) all.push_back(table("avx512_vnni", avx512_vnni_quantized_kernels));
#endif
  return all;
}

using Results = std::vector<std::pair<const float*, int64_t>>;

void compare(const char* what, const char* isa, const Results& expected, const Results& actual) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::memcmp(expected[i].first, actual[i].first, expected[i].second * sizeof(float)) == 0) continue;
    std::fprintf(stderr, "isas: %s: %s gives other bits than baseline in result %zu\n", what, isa, i);
    std::exit(1);
  }
}

void recurrence(const std::vector<Table>& tables, int threads) {
  Arrays a;
  RecurrenceSizes s = {};
  s.mode = static_cast<Mode>(generator() % 5);
  s.steps = one_of({1, 2, 9});
  s.batch = one_of({1, 2, 5, 17, 40});
  s.input = one_of({0, 1, 7, 33, 100});
  s.hidden = one_of({1, 3, 17, 64, 130});
  s.output = s.mode == Mode::kLstm && s.hidden > 2 && flag() ? s.hidden / 2 : s.hidden;
  s.reverse = flag();
  std::vector<int64_t> offsets = {0};
  int64_t rows = s.batch;
  const bool by_length = flag();
  for (int64_t t = 0; t < s.steps; ++t) {
    offsets.push_back(offsets.back() + rows);
    if (by_length) rows = 1 + static_cast<int64_t>(generator()) % rows;
  }
  s.row_offsets = offsets.data();
  const int64_t N = offsets.back(), H = s.hidden, P = s.output, gates = gates_of(s.mode);
  const bool lstm = s.mode == Mode::kLstm, state = flag();
  QuantizedRecurrenceParams<int8_t> p = {};
  p.call.sizes = s;
  p.call.x = a.in(N * s.input);
  p.call.h0 = state ? a.in(s.batch * P) : nullptr;
  p.call.c0 = state && lstm ? a.in(s.batch * H) : nullptr;
  p.call.b_ih = flag() ? a.in(gates * H) : nullptr;
  p.call.b_hh = flag() ? a.in(gates * H) : nullptr;
  p.ih = a.packed(gates, H, s.input, kInputDepth);
  p.hh = a.packed(gates, H, P, kStateDepth<int8_t>);
  if (s.projected()) p.hr = a.packed(1, P, H, kStateDepth<int8_t>);
  Results expected;
  for (const auto& [isa, kernel] : tables) {
    const int size = kernel->recurrence_threads(s, threads);
    float *const y = a.out(N * P), *const h = a.out(s.batch * P), *const c = lstm ? a.out(s.batch * H) : nullptr;
    p.call.y = y;
    p.call.h_n = h;
    p.call.c_n = c;
    p.call.workspace = a.out(kernel->recurrence_workspace(s, size));
    run_team(size, [&, run = kernel->recurrence](const ThreadTeam& team) { run(p, team); });
    const Results results = {{y, N * P}, {h, s.batch * P}, {c, lstm ? s.batch * H : 0}};
    if (expected.empty()) expected = results;
    compare("recurrence", isa, expected, results);
  }
}

void linear(const std::vector<Table>& tables, int threads) {
  Arrays a;
  const LinearSizes s = {one_of({1, 2, 7, 25, 70}), one_of({0, 1, 5, 17, 600}), one_of({1, 3, 17, 50, 700})};
  const float *x = a.in(s.rows * s.input), *b = flag() ? a.in(s.output) : nullptr;
  const QuantizedMatrix<int8_t> w = a.packed(1, s.output, s.input, kInputDepth);
  Results expected;
  for (const auto& [isa, kernel] : tables) {
    const int size = kernel->linear_threads(s, threads);
    float* const y = a.out(s.rows * s.output);
    const QuantizedLinearParams<int8_t> p = {s, x, w, b, y, a.out(kernel->linear_workspace(s, size))};
    run_team(size, [&, run = kernel->linear](const ThreadTeam& team) { run(p, team); });
    const Results results = {{y, s.rows * s.output}};
    if (expected.empty()) expected = results;
    compare("linear", isa, expected, results);
  }
}

}  // namespace
}  // namespace llm_ext

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::stoi(arguments[1]) : 100;
  const auto tables = llm_ext::supported_tables();
  for (int i = 0; i < rounds; ++i) {
    llm_ext::generator.seed(i);
    llm_ext::recurrence(tables, 1 + i % 3);
    llm_ext::linear(tables, 1 + i % 3);
  }
  std::printf("isas:");
  for (const auto& table : tables) std::printf(" %s", table.first);
  std::printf(", %d rounds\n", rounds);
}
