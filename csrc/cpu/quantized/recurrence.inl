// The forward pass of a recurrence with packed weights of 8 or 16 bits. Tensors and states are float.
//
// As in rnn/forward.inl, steps go in blocks: the input projection of a block, then the loop over its steps.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/quantized/product.inl"
#include "cpu/ranges.inl"
#include "cpu/rnn/cells.inl"
#include "cpu/rnn/partition.inl"
#include "cpu/rnn/states.inl"
#include "cpu/rnn/steps.inl"
#include "cpu/rnn/workspace.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Sizes of the arrays in the workspace, in this order in memory, in floats.
template <typename W>
struct QuantizedWorkspace {
  QuantizedWorkspace(const RecurrenceSizes& s, int threads)
      : bias(aligned(gates_of(s.mode) * s.hidden)),
        z(aligned(max_step_block_rows<float>(s) * gates_of(s.mode) * s.hidden)),
        m(s.projected() ? aligned(s.batch * s.hidden) : 0),
        left(most(blocked_space<InputProduct<W>>(max_step_block_rows<float>(s), s.input),
                  most(StateProduct<W>::space(s.batch, s.output),
                       s.projected() ? StateProduct<W>::space(s.batch, s.hidden) : 0))),
        total(bias + z + m + threads * left) {}

  static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

  int64_t bias;  // biases of the input's blocks
  int64_t z;     // pre-activations of a block of steps
  int64_t m;     // output of a step before the projection
  int64_t left;  // per thread: left factors
  int64_t total;
};

template <typename W>
static int64_t quantized_recurrence_workspace(const RecurrenceSizes& s, int threads) {
  return QuantizedWorkspace<W>(s, threads).total;
}

static int quantized_recurrence_threads(const RecurrenceSizes& s, int threads) {
  const double projection = static_cast<double>(gates_of(s.mode)) * s.hidden * s.input;
  return threads_worth(total_rows(s) * (row_work(s) + projection), kQuantizedWorkPerThread, threads);
}

template <typename W, typename C>
static void quantized_forward(const QuantizedRecurrenceParams<W>& params, const ThreadTeam& team) {
  using A = StateProduct<W>;
  const RecurrenceForwardParams<float>& p = params.call;
  const RecurrenceSizes& s = p.sizes;
  const int64_t H = s.hidden, P = s.output;
  const int64_t gates = C::kGates * H;
  const bool projected = C::kHasCell && s.projected();
  const Order order{s};
  const QuantizedWorkspace<W> sizes(s, team.size);
  float* const bias = p.workspace;
  float* const z = bias + sizes.bias;
  float* const m = z + sizes.z;
  float* const left = m + sizes.m + team.rank * sizes.left;

  const Range units = team.slice(H, kAlign);
  for (int b = 0; b < C::kGates; ++b) {
    const int g = state_gate<C>(b);
    for_each_vector<float>(units.size(), [&](int64_t j, int lanes) {
      const int64_t col = units.begin + j;
      Vec<float> sum{};
      if (p.b_ih != nullptr) sum = load_partial(p.b_ih + input_gate<C>(b) * H + col, lanes);
      if (g >= 0 && p.b_hh != nullptr) sum += load_partial(p.b_hh + g * H + col, lanes);
      store_partial(bias + b * H + col, sum, lanes);
    });
  }

  const int64_t panels = divide_up(H, kQuantizedPanel);
  const Partition partition = partition_of(s, team, sizeof(W), kQuantizedPanel);
  const States<float, C> states(p, nullptr, nullptr);
  states.start(partition.rows, partition.columns, partition.output_columns);
  const int64_t limit = step_block_rows<float>(s);

  for (int64_t begin = 0, end = 0; begin < s.steps; begin = end) {
    int64_t count = 0;
    do count += order.rows(end++);
    while (end < s.steps && count + order.rows(end) <= limit);
    const int64_t first = s.reverse ? order.first_row(end - 1) : order.first_row(begin);

    team.sync();
    const auto slice = slice_product(count, panels, team);
    blocked_product<InputProduct<W>, C::kGates>(
        p.x + (first + slice.rows.begin) * s.input, slice.rows.size(), s.input, params.ih, H, slice.panels, left,
        [&](int64_t row, int64_t col, Vec<float>(&values)[C::kGates], int lanes) {
          for (int b = 0; b < C::kGates; ++b) {
            const int64_t column = b * H + col;
            store_partial(z + (slice.rows.begin + row) * gates + column,
                          values[input_gate<C>(b)] + load_partial(bias + column, lanes), lanes);
          }
        });
    team.sync();

    for (int64_t i = begin; i < end; ++i) {
      const Range all = intersect(partition.rows, {0, order.rows(i)});
      const auto target = states.target(i);
      const float* const step_z = z + (order.first_row(i) - first) * gates;
      const auto finish = [&](const float* previous, int64_t r, int64_t col, Vec<float>(&values)[C::kGates],
                              int lanes) {
        Vec<float> blocks[C::kBlocks];
        for (int b = 0; b < C::kBlocks; ++b) {
          const int g = state_gate<C>(b);
          if (b < C::kGates) {
            blocks[b] = load_partial(step_z + r * gates + b * H + col, lanes);
            if (g >= 0) blocks[b] += values[g];
          } else {
            blocks[b] = values[g];
            if (p.b_hh != nullptr) blocks[b] += load_partial(p.b_hh + g * H + col, lanes);
          }
        }
        const Vec<float> h = forward_units<float, C>(blocks, previous == nullptr ? nullptr : previous + col,
                                                     states.cell(r, col), static_cast<float*>(nullptr), H, lanes);
        if (!projected) return target.store(r, col, h, lanes);
        store_partial(m + r * H + col, h, lanes);
      };
      // Rows that all continue, or all join.
      const auto step = [&](Range r) {
        if (r.size() == 0) return;
        const float* previous = states.before(i, r.begin);
        if (previous == nullptr) {
          for (int64_t row = r.begin; row < r.end; ++row) {
            for_each_vector<float>(partition.columns.size(), [&](int64_t j, int lanes) {
              Vec<float> zeros[C::kGates] = {};
              finish(nullptr, row, partition.columns.begin + j, zeros, lanes);
            });
          }
          return;
        }
        panels_product<A, C::kGates>(A::prepare(previous, P, r.size(), P, left), r.size(), P, params.hh, H,
                                     partition.panels, i % 2 != 0,
                                     [&](int64_t row, int64_t col, Vec<float>(&values)[C::kGates], int lanes) {
                                       finish(previous + row * P, r.begin + row, col, values, lanes);
                                     });
      };
      step(intersect(all, {0, order.rows(i - 1)}));
      step(intersect(all, {order.rows(i - 1), order.rows(i)}));
      if (projected) {
        if (partition.barrier) team.sync();
        panels_product<A, 1>(A::prepare(m + all.begin * H, H, all.size(), H, left), all.size(), H, params.hr, P,
                             partition.output_panels, i % 2 != 0,
                             [&](int64_t row, int64_t col, Vec<float>(&value)[1], int lanes) {
                               target.store(all.begin + row, col, value[0], lanes);
                             });
      }
      states.end(i, partition.rows, partition.output_columns);
      if (partition.barrier) team.sync();
    }
  }
  states.finish(partition.rows, partition.columns);
}

template <typename W>
static void quantized_recurrence(const QuantizedRecurrenceParams<W>& p, const ThreadTeam& team) {
  with_cell(p.call.sizes.mode, [&](auto cell) { quantized_forward<W, decltype(cell)>(p, team); });
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
