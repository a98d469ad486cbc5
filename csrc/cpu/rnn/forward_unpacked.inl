// The forward pass of a few rows with unpacked weights: one step of generation, greedy search, short prompts.
#pragma once

#include "cpu/gemm/blocking.inl"
#include "cpu/gemm/gemv.inl"
#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"
#include "cpu/rnn/cells.inl"
#include "cpu/rnn/states.inl"
#include "cpu/rnn/steps.inl"
#include "cpu/rnn/workspace.inl"
#include "cpu/simd/float16.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Computes a vector of units at a time, by dot products with rows of W_ih [G H, I] and W_hh [G H, H].
template <typename S, typename C>
static void forward_unpacked(const RecurrenceForwardParams<S>& p, const ThreadTeam& team) {
  using T = Compute<S>;
  const RecurrenceSizes& s = p.sizes;
  const int64_t H = s.hidden;
  const int64_t saved_width = saved_blocks(s.mode, false) * H;
  const Order order{s};
  const Range columns = team.slice(H, kLanes<T>);
  const Range all = {0, s.batch};
  const States<S, C> states(p, p.workspace, p.workspace + ForwardWorkspace<S>(s, team.size).states);
  states.start(all, columns, columns);
  if (kIsNarrow<S>) team.sync();
  for (int64_t i = 0; i < s.steps; ++i) {
    const auto target = states.target(i);
    const int64_t first_row = order.first_row(i);
    // Rows that all continue, or all join.
    const auto step = [&](Range rows) {
      if (rows.size() == 0) return;
      const S* x = p.x + (first_row + rows.begin) * s.input;
      const T* h = states.before(i, rows.begin);
      const Tiles tiles(rows.size(), kDotRows, kDotRows);
      for_each_vector<T>(columns.size(), [&](int64_t j, int lanes) {
        const int64_t col = columns.begin + j;
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
          const Range tile_rows = tiles[tile];
          Vec<T> z[C::kBlocks][kDotRows];
          for (int b = 0; b < C::kBlocks; ++b) {
            DotFactors<S, S> input{};
            DotFactors<T, S> state{};
            if (b < C::kGates) input = {x, s.input, p.w_ih + (input_gate<C>(b) * H + col) * s.input, s.input, s.input};
            if (state_gate<C>(b) >= 0 && h != nullptr) state = {h, H, p.w_hh + (state_gate<C>(b) * H + col) * H, H, H};
            row_dots<T>(input.rows_from(tile_rows.begin), state.rows_from(tile_rows.begin), tile_rows.size(), lanes,
                        z[b]);
          }
          for (int64_t m = tile_rows.begin; m < tile_rows.end; ++m) {
            const int64_t r = rows.begin + m;
            Vec<T> blocks[C::kBlocks];
            for (int b = 0; b < C::kBlocks; ++b) {
              blocks[b] = z[b][m - tile_rows.begin];
              const int64_t in = input_gate<C>(b) * H + col, hidden = state_gate<C>(b) * H + col;
              if (b < C::kGates && p.b_ih != nullptr) blocks[b] += load_partial(p.b_ih + in, lanes);
              if (b < C::kGates && p.input_projections != nullptr) {
                blocks[b] += load_partial(p.input_projections + p.input_ids[first_row + r] * C::kGates * H + in, lanes);
              }
              if (state_gate<C>(b) >= 0 && p.b_hh != nullptr) blocks[b] += load_partial(p.b_hh + hidden, lanes);
            }
            const Vec<T> h_now = forward_units<S, C>(
                blocks, h == nullptr ? nullptr : h + m * H + col, states.cell(r, col),
                p.saved == nullptr ? nullptr : p.saved + (first_row + r) * saved_width + col, H, lanes);
            target.store(r, col, h_now, lanes);
          }
        }
      });
    };
    const Range now = {0, order.rows(i)};
    step(intersect(now, {0, order.rows(i - 1)}));
    step(intersect(now, {order.rows(i - 1), order.rows(i)}));
    states.end(i, all, columns);
    if (i + 1 < s.steps) team.sync();
  }
  states.finish(all, columns);
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
