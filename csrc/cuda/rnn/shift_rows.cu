// Rows moved by one step, and padding made zero: reads and writes each row once, so that memory is the limit.
//
// Blocks along x take steps in turn, those along y parts of a step; the threads of a block move neighbouring words.
#include "cuda/device.cuh"
#include "cuda/rnn/shift_rows.h"

namespace llm_ext {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kWordsOfThread = 4;  // of one step, before it is shared by more blocks; not measured yet

template <typename Word>
struct RowCopyParams {
  RowCopy copy;
  int64_t words;  // a row
};

template <typename Word>
LLM_EXT_KERNEL(kThreads)
void copy_rows_kernel(LLM_EXT_PARAMS RowCopyParams<Word> p) {
  const RowCopy& c = p.copy;
  const auto offset = [&](int64_t t) { return c.row_offsets != nullptr ? c.row_offsets[t] : t * c.batch; };
  for (int64_t t = block_x(); t < c.steps; t += grid_x()) {
    const int64_t begin = offset(t), rows = offset(t + 1) - begin;
    const int64_t other = t + c.shift;
    const bool inside = other >= 0 && other < c.steps;
    // Of the other step, those rows that are there.
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
bool fits(const RowCopy& c) {
  const auto whole = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % sizeof(Word) == 0; };
  return whole(c.from) && whole(c.first) && whole(c.to) && c.row_bytes % sizeof(Word) == 0 &&
         c.from_stride % sizeof(Word) == 0;
}

template <typename Word>
int launch_copy(const RowCopy& c, void* stream) {
  const RowCopyParams<Word> p = {c, c.row_bytes / static_cast<int64_t>(sizeof(Word))};
  const int64_t parts = c.batch * p.words / (kThreads * kWordsOfThread) + 1;
  LaunchShape shape;
  shape.grid_x = static_cast<unsigned>(c.steps < (1 << 16) ? c.steps : 1 << 16);
  shape.grid_y = static_cast<unsigned>(parts < 64 ? parts : 64);
  shape.threads = kThreads;
  return launch(copy_rows_kernel<Word>, shape, p, stream);
}

}  // namespace

int copy_rows(const RowCopy& copy, void* stream) {
  if (fits<Pack<uint32_t, 4>>(copy)) return launch_copy<Pack<uint32_t, 4>>(copy, stream);
  if (fits<uint64_t>(copy)) return launch_copy<uint64_t>(copy, stream);
  if (fits<uint32_t>(copy)) return launch_copy<uint32_t>(copy, stream);
  return launch_copy<uint16_t>(copy, stream);
}

}  // namespace cuda
}  // namespace llm_ext
