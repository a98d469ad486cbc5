// How the thread team partitions the loop over time: by batch rows, by columns, or not at all. The measurements behind
// the constants are in docs/lab/cpu-constants.md.
#pragma once

#include "cpu/gemm/blocking.inl"
#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"
#include "cpu/rnn/steps.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Multiply-adds of a step, per thread, that are worth a barrier of about 0.3 us.
constexpr double kStepWorkPerThread = 8.0e3;
// Batch rows per thread from which Split::kRows is faster. With fewer, tiles are too small to keep the micro-kernel
// supplied with loads. One row less suffices if U is small enough to be read quickly (kSmallWeightBytes, Zen 3). More
// are needed if U does not stay in the L2 cache (kLargeWeightBytes, Zen 5), where each thread should read only half.
constexpr int64_t kRowsPerThread = 4;
constexpr int64_t kSmallWeightBytes = 256 << 10;
constexpr int64_t kRowsPerThreadLargeWeights = 9;
constexpr int64_t kLargeWeightBytes = 3 << 19;

enum class Split {
  kRows,     // each thread runs its own batch rows through all steps: no barrier
  kColumns,  // each thread computes its own columns of every step: a barrier per step
  kNone      // one thread runs the loop: steps are too small to split
};

// For weights of `weight_bytes` each, in panels of `panel` columns.
static inline Split choose_split(const RecurrenceSizes& s, int threads, int64_t weight_bytes, int64_t panel) {
  if (threads == 1) return Split::kNone;
  // Sequences of unequal lengths go by columns: by rows, tiles would shrink as sequences end.
  const double bytes = row_work(s) * weight_bytes;
  const int64_t rows =
      bytes > kLargeWeightBytes ? kRowsPerThreadLargeWeights : kRowsPerThread - (bytes <= kSmallWeightBytes);
  if (of_one_length(s) && s.batch >= rows * threads) return Split::kRows;
  if (divide_up(s.hidden, panel) >= threads && s.batch * row_work(s) >= kStepWorkPerThread * threads)
    return Split::kColumns;
  return s.batch >= threads ? Split::kRows : Split::kNone;
}

static int recurrence_threads(const RecurrenceSizes& s, int threads) {
  const double projection = static_cast<double>(gates_of(s.mode)) * s.hidden * s.input;
  return threads_worth(total_rows(s) * (row_work(s) + projection), kWorkPerThread, threads);
}

// One thread per recurrence needs no barrier, but each thread reads all of U, so U must be small. Zen 3:
// docs/lab/cpu-constants.md.
template <typename S>
static bool one_thread_per_recurrence(const RecurrenceSizes& s, int recurrences, int threads) {
  const double useful = s.batch * row_work(s) / kStepWorkPerThread;
  const bool small = row_work(s) * sizeof(S) <= kSmallWeightBytes;
  return small && threads > 1 && recurrences > 1 && recurrence_threads(s, 2) > 1 &&
         s.batch < (kRowsPerThread - 1) * threads && (recurrences >= threads || recurrences >= useful);
}

// The first batch row of thread `rank`, such that each of `size` threads has about the same number of the N rows.
// Sequences are sorted by descending length, so equal numbers of batch rows would be unequal work.
static int64_t balanced_row(const RecurrenceSizes& s, int rank, int size) {
  if (rank == 0) return 0;
  if (rank == size) return s.batch;
  const int64_t goal = total_rows(s) / size * rank;
  int64_t low = 0, high = s.batch;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    int64_t before = 0;
    for (int64_t t = 0; t < s.steps; ++t) {
      const int64_t rows = s.row_offsets[t + 1] - s.row_offsets[t];
      before += rows < middle ? rows : middle;
    }
    if (before < goal) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The slice of every step that one thread computes, with panels of the packed weights.
struct Partition {
  Range rows;            // batch rows
  Range panels;          // of the H columns
  Range columns;         // the columns of these panels
  Range output_panels;   // of the P columns; equal to `panels` unless the output is projected
  Range output_columns;  // the columns of these panels
  bool barrier;          // whether the team synchronizes after each step
};

static inline Range columns_of(Range panels, int64_t panel, int64_t cols) {
  return intersect({panels.begin * panel, panels.end * panel}, {0, cols});
}

static Partition partition_of(const RecurrenceSizes& s, const ThreadTeam& team, int64_t weight_bytes, int64_t panel) {
  Partition partition = {{0, s.batch}, {0, divide_up(s.hidden, panel)}, {}, {0, divide_up(s.output, panel)}, {}, false};
  switch (choose_split(s, team.size, weight_bytes, panel)) {
    case Split::kRows:
      partition.rows = of_one_length(s)
                           ? team.slice(s.batch)
                           : Range{balanced_row(s, team.rank, team.size), balanced_row(s, team.rank + 1, team.size)};
      break;
    case Split::kColumns:
      partition.panels = team.slice(partition.panels.end);
      partition.output_panels = team.slice(partition.output_panels.end);
      partition.barrier = true;
      break;
    case Split::kNone:
      if (team.rank != 0) partition.rows = {0, 0};
      break;
  }
  partition.columns = columns_of(partition.panels, panel, s.hidden);
  partition.output_columns = columns_of(partition.output_panels, panel, s.output);
  return partition;
}

template <typename S>
static inline Partition partition_of(const RecurrenceSizes& s, const ThreadTeam& team) {
  return partition_of(s, team, sizeof(S), kNR<Compute<S>>);
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
