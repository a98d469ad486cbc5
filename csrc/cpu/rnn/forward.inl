// The forward pass with packed weights.
//
// Tensors are stored as S and computed as T. Left factors of products are Factor<S>, packed weights S. Steps go in
// blocks: one product for the input projection of a block, then the loop over its steps, which turns pre-activations
// into states while they are in the cache.
#pragma once

#include "cpu/gemm/blocking.inl"
#include "cpu/gemm/gemm.inl"
#include "cpu/gemm/packing.inl"
#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"
#include "cpu/rnn/cells.inl"
#include "cpu/rnn/partition.inl"
#include "cpu/rnn/states.inl"
#include "cpu/rnn/steps.inl"
#include "cpu/rnn/workspace.inl"
#include "cpu/simd/float16.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

template <typename S>
static void pack_weights(const RecurrenceForwardParams<S>& p, void* out, const ThreadTeam& team) {
  using T = Compute<S>;
  using R = S;
  R* const packed = static_cast<R*>(out);
  const RecurrenceSizes& s = p.sizes;
  const int64_t H = s.hidden, P = s.output;
  const int64_t gates = gates_of(s.mode);
  const PackedWeights<R> sizes(s);
  pack_transposed(input_weight_rows(p.w_ih, s), gates * H, s.input, team.slice(panels_of<T>(gates * H)), packed);
  for (int64_t g = 0; g < gates; ++g) {
    pack_transposed(WeightRows<S>{p.w_hh + g * H * P, P, H}, H, P, team.slice(panels_of<T>(H)),
                    packed + sizes.ih + g * sizes.hh_gate);
  }
  if (s.projected()) {
    pack_transposed(WeightRows<S>{p.w_hr, H, P}, P, H, team.slice(panels_of<T>(P)),
                    packed + sizes.ih + gates * sizes.hh_gate);
  }
}

// Pre-activations of rows: x W_ih^T + bias, into z with rows `z_width` apart.
template <typename S>
__attribute__((noinline)) static void input_product(const S* x, int64_t rows, int64_t I, const S* packed_ih,
                                                    int64_t gates, const Compute<S>* bias, Compute<S>* z,
                                                    int64_t z_width, Factor<S>* space) {
  long_product(x, I, rows, I, packed_ih, gates, space, [=](int64_t row, int64_t col, Vec<Compute<S>> value, int lanes) {
    store_partial(z + row * z_width + col, value + load_partial(bias + col, lanes), lanes);
  });
}

template <typename S, typename C>
static void forward_packed(const RecurrenceForwardParams<S>& p, const ThreadTeam& team) {
  using T = Compute<S>;
  using R = S;
  using L = Factor<S>;
  const RecurrenceSizes& s = p.sizes;
  const int64_t H = s.hidden, P = s.output;
  const int64_t gates = C::kGates * H;
  const bool projected = C::kHasCell && s.projected();
  const Order order{s};
  const PackedWeights<R> weights(s);
  const R* packed_ih = static_cast<const R*>(p.packed);
  const R* packed_hh = packed_ih + weights.ih;
  const R* packed_hr = packed_hh + C::kGates * weights.hh_gate;
  const ForwardWorkspace<S> sizes(s, team.size);
  T* bias = p.workspace;
  T* block_z = bias + sizes.bias;
  L* step_m = reinterpret_cast<L*>(block_z + sizes.z);
  T* two_steps = block_z + sizes.z + sizes.m;
  T* cells = two_steps + sizes.states;
  L* left = reinterpret_cast<L*>(cells + sizes.cells + team.rank * sizes.left);

  const Range biases = team.slice(gates, kAlign);
  for (int64_t j = biases.begin; j < biases.end; ++j) {
    const int b = static_cast<int>(j / H);
    bias[j] = p.b_ih == nullptr ? T(0) : read(p.b_ih + input_gate<C>(b) * H + j % H);
    if (state_gate<C>(b) >= 0 && p.b_hh != nullptr) bias[j] += read(p.b_hh + state_gate<C>(b) * H + j % H);
  }

  const Partition partition = partition_of<S>(s, team);
  const States<S, C> states(p, two_steps, cells);
  states.start(partition.rows, partition.columns, partition.output_columns);
  const int64_t saved_width = saved_blocks(s.mode, projected) * H;
  // Pre-activations are stored where their gates will be saved or, for Elman, where the states will be stored. If no
  // such result has type T, all blocks use the same workspace.
  T* z_result = nullptr;
  if constexpr (!kIsNarrow<S>) z_result = !C::kSavesBlocks ? p.y : p.saved;
  const int64_t z_width = z_result == nullptr ? gates : (C::kSavesBlocks ? saved_width : H);
  const int64_t limit = step_block_rows<T>(s);
  const auto projection_row = [&](int64_t row) {
    return p.input_projections == nullptr ? nullptr : p.input_projections + p.input_ids[row] * gates;
  };

  for (int64_t begin = 0, end = 0; begin < s.steps; begin = end) {
    int64_t count = 0;
    do count += order.rows(end++);
    while (end < s.steps && count + order.rows(end) <= limit);
    const int64_t first = s.reverse ? order.first_row(end - 1) : order.first_row(begin);
    T* const z = z_result == nullptr ? block_z : z_result + first * z_width;

    team.sync();
    if (p.input_projections == nullptr) {
      const Range rows = team.slice(count, kMR);
      input_product(p.x + (first + rows.begin) * s.input, rows.size(), s.input, packed_ih, gates, bias,
                    z + rows.begin * z_width, z_width, left);
      team.sync();
    }

    for (int64_t i = begin; i < end; ++i) {
      const int64_t first_row = order.first_row(i);
      const Range all = intersect(partition.rows, {0, order.rows(i)});
      const auto target = states.target(i);
      S* const saved = p.saved == nullptr ? nullptr : p.saved + first_row * saved_width;
      // With a projection, m is the output of the cell: in the saved activations if they have its type.
      S* const saved_m = saved == nullptr ? nullptr : saved + (C::kBlocks + 1) * H;
      L* m = step_m;
      int64_t m_width = H;
      if constexpr (!kIsNarrow<S>) {
        if (saved_m != nullptr) m = saved_m, m_width = saved_width;
      }
      const auto finish = [&](const T* previous, int64_t r, int64_t col, Vec<T>(&values)[C::kGates], int lanes) {
        const T* z_row = z + (first_row - first + r) * z_width + col;
        const S* projection = projection_row(first_row + r);
        Vec<T> blocks[C::kBlocks];
        for (int b = 0; b < C::kBlocks; ++b) {
          const int g = state_gate<C>(b);
          if (b < C::kGates) {
            if (projection == nullptr) {
              blocks[b] = load_partial(z_row + b * H, lanes);
            } else {
              blocks[b] = load_partial(projection + input_gate<C>(b) * H + col, lanes) +
                          load_partial(bias + b * H + col, lanes);
            }
            if (g >= 0) blocks[b] += values[g];
          } else {
            blocks[b] = values[g];
            if (p.b_hh != nullptr) blocks[b] += load_partial(p.b_hh + g * H + col, lanes);
          }
        }
        const Vec<T> h =
            forward_units<S, C>(blocks, previous == nullptr ? nullptr : previous + col, states.cell(r, col),
                                saved == nullptr ? nullptr : saved + r * saved_width + col, H, lanes);
        if (!projected) return target.store(r, col, h, lanes);
        store_partial(m + r * m_width + col, h, lanes);
        if constexpr (kIsNarrow<S>) {
          if (saved_m != nullptr) store_partial(saved_m + r * saved_width + col, h, lanes);
        }
      };
      // Rows that all continue, or all join.
      const auto step = [&](Range r) {
        if (r.size() == 0) return;
        const T* previous = states.before(i, r.begin);
        const L* factor = states.factor_before(i, r.begin);
        if (factor == nullptr) {
          for (int64_t row = r.begin; row < r.end; ++row) {
            for_each_vector<T>(partition.columns.size(), [&](int64_t j, int lanes) {
              Vec<T> zeros[C::kGates] = {};
              finish(nullptr, row, partition.columns.begin + j, zeros, lanes);
            });
          }
          return;
        }
        gates_product<C::kGates>(
            Rows<L>{factor, P}, r.size(), P, packed_hh, weights.hh_gate, H, Panels{partition.panels, i % 2 != 0},
            [&](int64_t row, int64_t col) {
              if (const S* projection = projection_row(first_row + r.begin + row); projection != nullptr) {
                for (int b = 0; b < C::kGates; ++b) __builtin_prefetch(projection + b * H + col);
                return;
              }
              const T* z_row = z + (first_row - first + r.begin + row) * z_width + col;
              for (int b = 0; b < C::kGates; ++b) __builtin_prefetch(z_row + b * H, 1);
            },
            [&](int64_t row, int64_t col, Vec<T>(&values)[C::kGates], int lanes) {
              finish(previous + row * P, r.begin + row, col, values, lanes);
            });
      };
      step(intersect(all, {0, order.rows(i - 1)}));
      step(intersect(all, {order.rows(i - 1), order.rows(i)}));
      if (projected) {
        if (partition.barrier) team.sync();
        product(
            Rows<L>{m + all.begin * m_width, m_width}, all.size(), H, packed_hr, P,
            Panels{partition.output_panels, i % 2 != 0}, [](int64_t, int64_t) {},
            [&](int64_t row, int64_t col, Vec<T> value, int lanes) {
              target.store(all.begin + row, col, value, lanes);
            });
      }
      states.end(i, partition.rows, partition.output_columns);
      if (partition.barrier) team.sync();
    }
  }
  states.finish(partition.rows, partition.columns);
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
