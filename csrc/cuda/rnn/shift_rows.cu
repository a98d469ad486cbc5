// Reads and writes each row once: memory bandwidth is the limit.
//
// Blocks along x take the steps cyclically, blocks along y share a step. Adjacent threads copy adjacent words.
#include "cuda/device.cuh"
#include "cuda/rnn/shift_rows.h"

namespace llm_ext {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kWordsPerThread = 4;  // of one step, before more blocks share it; not tuned

template <typename Word>
struct RowShiftParams {
  RowShift call;
  int64_t words;  // per row
};

template <typename Word>
LLM_EXT_KERNEL(kThreads)
void shift_rows_kernel(LLM_EXT_PARAMS RowShiftParams<Word> p) {
  const RowShift& c = p.call;
  const auto offset = [&](int64_t t) { return c.row_offsets != nullptr ? c.row_offsets[t] : t * c.batch; };
  for (int64_t t = block_x(); t < c.steps; t += grid_x()) {
    const int64_t begin = offset(t), rows = offset(t + 1) - begin;
    const int64_t other = t + c.shift;
    const bool inside = other >= 0 && other < c.steps;
    const int64_t other_begin = inside ? offset(other) : 0;
    const int64_t other_rows = inside ? offset(other + 1) - other_begin : 0;
    for (int64_t i = static_cast<int64_t>(block_y()) * thread_count() + thread_index(); i < rows * p.words;
         i += static_cast<int64_t>(grid_y()) * thread_count()) {
      const int64_t b = i / p.words, word = i % p.words;
      const int64_t end = c.lengths == nullptr ? c.steps : c.lengths[b];
      Word value = {};
      if (t < end) {
        if (b < other_rows && other < end) {
          const unsigned char* row = static_cast<const unsigned char*>(c.from) + (other_begin + b) * c.from_stride;
          value = reinterpret_cast<const Word*>(row)[word];
        } else if (c.first != nullptr) {
          value = static_cast<const Word*>(c.first)[i];
        }
      }
      static_cast<Word*>(c.to)[begin * p.words + i] = value;
    }
  }
}

template <typename Word>
bool fits(const RowShift& c) {
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % sizeof(Word) == 0; };
  return aligned(c.from) && aligned(c.first) && aligned(c.to) && c.row_bytes % sizeof(Word) == 0 &&
         c.from_stride % sizeof(Word) == 0;
}

template <typename Word>
int launch_words(const RowShift& c, void* stream) {
  const RowShiftParams<Word> p = {c, c.row_bytes / static_cast<int64_t>(sizeof(Word))};
  const int64_t blocks = c.batch * p.words / (kThreads * kWordsPerThread) + 1;
  LaunchShape shape;
  shape.grid_x = c.steps < (1 << 16) ? c.steps : 1 << 16;
  shape.grid_y = blocks < 64 ? blocks : 64;
  shape.threads = kThreads;
  return launch(shift_rows_kernel<Word>, shape, p, stream);
}

}  // namespace

int shift_rows(const RowShift& call, void* stream) {
  if (fits<Pack<uint32_t, 4>>(call)) return launch_words<Pack<uint32_t, 4>>(call, stream);
  if (fits<uint64_t>(call)) return launch_words<uint64_t>(call, stream);
  if (fits<uint32_t>(call)) return launch_words<uint32_t>(call, stream);
  return launch_words<uint16_t>(call, stream);
}

}  // namespace cuda
}  // namespace llm_ext
