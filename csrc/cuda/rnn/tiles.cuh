// The recurrence with U held on the chip: one launch for the whole sequence, one loop for three routes, forward and
// backward.
//
// What a block owns. The units are dealt out in groups of 16 to `parts` blocks; a block holds the rows (backward:
// columns) of U of its groups for the whole call, first in registers, then in shared memory (what is still left, in a
// grid, is laid out in the workspace and read from there at every step), and does the steps of its units for row_tiles
// tiles of up to 8 rows of the batch. Other rows belong to other blocks, which hold the same part of U (grid y), and
// the other direction to yet others (grid z).
//
// What a warp owns. Group warp % groups, and the tiles of columns of its share warp / groups of the sum. Where several
// warps share a sum, they leave their parts in shared memory, and for tile j the warp of share j % k_parts adds them up
// and does the step. What a thread owns: two neighbouring units (rows r and r + 8 of a tile of weights are units 2 r
// and 2 r + 1 of the group) of two neighbouring rows of the batch, all gates of them; so the step needs no exchange.
// What it carries from step to step is saved in float, in a place of its own in shared memory.
//
// What passes between blocks at each step are the operands of the next product: h forward, H numbers a row; dz
// backward, G H numbers a row. By route:
//
// - block: nothing, one block has all units. One or two barriers of the block a step.
// - cluster: each block stores its part in the shared memory of all others, 16 bytes a thread at a time, where a
//   mailbox counts the bytes; who has all of them goes on. There is no barrier of the cluster after the first, since
//   its fence would wait for every store to the memory of the device.
// - grid: each block stores its part in the workspace (it stays in the second-level cache) and raises a flag for this
//   tile of rows; who needs the tile awaits the flags of all parts and copies it. There is no barrier of the grid: a
//   block that works at one tile does not wait for those who work at another.
//
// In a cluster and in a grid there are two buffers in turn, and nothing says that one may be written again: that
// happens two steps later, which needs everybody's part of the step between, and everybody gives that after having
// read.
//
// Counted, for a block and step of one tile of rows: 2 x 16 x 16 x 8 operations for each of its groups x k_tiles x
// tiles tiles of weights; shared memory read: 512 bytes (16 bits) or 1 KB for each tile of weights that is not in
// registers, and 256 or 512 bytes of states for each column tile and group. Memory of the device: what the steps read
// (gates_x; or saved, grad_y) and write (y, saved; or dz), once each, asked for two steps ahead.
//
// Sources: persistent RNNs, Diamos et al. 2016, for U in registers; the rest follows from counting.
#pragma once

#include "cuda/rnn/arithmetic.cuh"
#include "cuda/rnn/cells.cuh"
#include "cuda/device.cuh"
#include "cuda/rnn/launchers.h"
#include "cuda/rnn/steps.cuh"
#include "cuda/rnn/tiles.h"

namespace llm_ext {
namespace cuda {

constexpr int kUnits = 2;       // a thread
constexpr int kOwnRows = 2;     // a thread
constexpr int kStepsAhead = 2;  // of what steps read, brought into the second-level cache; not measured yet

template <typename Call>
struct TileParams {
  Call call;
  Route route;
  int parts, groups, k_parts, tile_rows, row_tiles;  // as in Plan
  TileLayout layout;
  // Of the grid's route, as grid_workspace() says; flags are 0.
  uint32_t* flags;
  void* exchange;
  Words* streamed;
};

// A row of the batch as the kernel sees it; length is -1 where there is none.
struct Row {
  int b;
  int length;
};

// Of a thread: its rows of a tile, what it owns of a product (unit e of row i at 2 e + i), and what it carries (unit e
// of row i at 2 i + e).
struct OwnRows {
  int first_b;
  int length[kOwnRows];
};
using Sums = float[kUnits * kOwnRows];
using Carried = Pack<float, kUnits * kOwnRows>;

// The forward pass: tiles of weights are the gates of a group, the sum goes over h.
template <typename A, typename C>
struct ForwardJob {
  using Arithmetic = A;
  using S = typename A::Stored;
  using Call = RecurrenceForward<S>;
  static constexpr Pass kPass = Pass::kForward;
  static constexpr int kTiles = C::kGates;
  static constexpr int kOperands = 1;  // blocks of H operands a row
  struct Operands {
    Pack<typename A::Operand, kUnits> at[kOperands];
  };
  static constexpr bool kCarries = C::kReadsState || C::kHasCell;
  static constexpr int kExtraSteps = 0;

  const RecurrenceShape& shape;
  const ForwardDirection<S>& d;
  int hidden;
  int unit;  // the first of this thread
  C cell;

  struct Inputs {
    int64_t place;
    ForwardStep<C, S, kUnits> step;
  };

  LLM_EXT_DEVICE ForwardJob(const Call& call, int first_unit)
      : shape(call.shape),
        d(call.direction[block_z()]),
        hidden(static_cast<int>(call.shape.hidden)),
        unit(first_unit),
        cell{call.shape.mode} {}

  // The step in a row's own time that all rows do in the i-th pass of the loop; and how many passes a tile has begun.
  LLM_EXT_DEVICE static int step_of(int i, int /*steps*/) { return i; }
  LLM_EXT_DEVICE static int passes_before(int i, int /*steps*/, int /*tile_steps*/) { return i; }

  // U, with its row given by tile and unit.
  LLM_EXT_DEVICE float weight(int tile, int row_unit, int /*block*/, int column) const {
    if (row_unit >= hidden || column >= hidden) return 0.0f;
    return widen(d.w_hh[(tile * shape.hidden + row_unit) * shape.hidden + column]);
  }

  // What the first product reads.
  LLM_EXT_DEVICE float first_operand(const Row& row, int /*block*/, int column) const {
    if (row.length < 0 || column >= hidden || d.h0 == nullptr) return 0.0f;
    return widen(d.h0[row.b * shape.hidden + column]);
  }

  LLM_EXT_DEVICE void clear(const Row& row, int from, int to) const {
    clear_beyond(shape, row.b, row.length, d.y, d.y_stride, from, to);
  }

  LLM_EXT_DEVICE void start(const Row& row, float (&carried)[kUnits]) const {
    const int64_t at = row.b * shape.hidden + unit;
    const Pack<S, kUnits> h0 = load_or_zeros<kUnits>(d.h0, at);
    Pack<S, kUnits> c0 = {};
    if constexpr (C::kHasCell) c0 = load_or_zeros<kUnits>(d.c0, at);
#pragma unroll
    for (int e = 0; e < kUnits; ++e) carried[e] = widen(C::kHasCell ? c0.at[e] : h0.at[e]);
    if (row.length > 0) return;
    *reinterpret_cast<Pack<S, kUnits>*>(d.h_n + at) = h0;
    if constexpr (C::kHasCell) *reinterpret_cast<Pack<S, kUnits>*>(d.c_n + at) = c0;
  }

  LLM_EXT_DEVICE void load_inputs(const Row& row, int s, Inputs& inputs) const {
    inputs.place = place_of(shape, d.reverse, row.b, row.length, s);
    inputs.step.load_at(shape, d, inputs.place, unit);
  }

  LLM_EXT_DEVICE void fetch_ahead(const Row& row, int s) const {
    if (s + kStepsAhead >= row.length) return;
    const int64_t place = place_of(shape, d.reverse, row.b, row.length, s + kStepsAhead);
    const S* at = d.gates_x + place * (C::kGates * shape.hidden) + unit;
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) prefetch(at + g * shape.hidden);
  }

  // The step of both rows side by side, so that neither waits for the other; only what is active is written.
  LLM_EXT_DEVICE void run(const OwnRows& rows, int s, const Inputs (&inputs)[kOwnRows], const Sums (&sums)[kTiles],
                          Carried& carried, Operands (&operands)[kOwnRows]) const {
    float bias[kTiles][kUnits];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      // Always in the first-level cache, where it costs no registers.
      const Pack<S, kUnits> of_gate = load_or_zeros<kUnits>(d.b_hh, t * shape.hidden + unit);
#pragma unroll
      for (int e = 0; e < kUnits; ++e) bias[t][e] = widen(of_gate.at[e]);
    }
    float blocks[kOwnRows][C::kBlocks][kUnits], c[kOwnRows][kUnits], h[kOwnRows][kUnits];
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      float product[kTiles][kUnits], h_before[kUnits];
#pragma unroll
      for (int e = 0; e < kUnits; ++e) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) product[t][e] = sums[t][kOwnRows * e + i] + bias[t][e];
        c[i][e] = h_before[e] = carried.at[kUnits * i + e];
      }
      inputs[i].step.compute(cell, product, h_before, c[i], blocks[i], h[i]);
    }
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      if (s >= rows.length[i]) continue;
#pragma unroll
      for (int e = 0; e < kUnits; ++e) {
        carried.at[kUnits * i + e] = C::kHasCell ? c[i][e] : h[i][e];
        operands[i].at[0].at[e] = A::operand(h[i][e]);
      }
      store(d.y + inputs[i].place * d.y_stride + unit, h[i]);
      inputs[i].step.keep(shape, d, inputs[i].place, unit, blocks[i], c[i], h[i]);
      if (s == rows.length[i] - 1) {
        const int64_t at = (rows.first_b + i) * shape.hidden + unit;
        store(d.h_n + at, h[i]);
        if constexpr (C::kHasCell) store(d.c_n + at, c[i]);
      }
    }
  }
};

// The backward pass: one tile of weights a group, the sum goes over the blocks of dz that the state has part in. One
// more product than steps, for the gradient of the initial state.
template <typename A, typename C>
struct BackwardJob {
  using Arithmetic = A;
  using S = typename A::Stored;
  using Call = RecurrenceBackward<S>;
  static constexpr Pass kPass = Pass::kBackward;
  static constexpr int kTiles = 1;
  static constexpr int kOperands = C::kGates;
  struct Operands {
    Pack<typename A::Operand, kUnits> at[kOperands];
  };
  static constexpr bool kCarries = C::kCarries;
  static constexpr int kExtraSteps = 1;

  const RecurrenceShape& shape;
  const BackwardDirection<S>& d;
  int hidden;
  int unit;
  C cell;

  struct Inputs {
    int64_t place;
    Pack<S, kUnits> grad_y;
    BackwardStep<C, S, kUnits> step;
  };

  LLM_EXT_DEVICE BackwardJob(const Call& call, int first_unit)
      : shape(call.shape),
        d(call.direction[block_z()]),
        hidden(static_cast<int>(call.shape.hidden)),
        unit(first_unit),
        cell{call.shape.mode} {}

  LLM_EXT_DEVICE static int step_of(int i, int steps) { return steps - 1 - i; }
  LLM_EXT_DEVICE static int passes_before(int i, int steps, int tile_steps) { return i - (steps - tile_steps); }

  LLM_EXT_DEVICE float weight(int /*tile*/, int row_unit, int block, int column) const {
    if (row_unit >= hidden || column >= hidden) return 0.0f;
    return widen(d.w_hh[(block * shape.hidden + column) * shape.hidden + row_unit]);
  }

  LLM_EXT_DEVICE float first_operand(const Row&, int /*block*/, int /*column*/) const { return 0.0f; }

  LLM_EXT_DEVICE void clear(const Row& row, int from, int to) const {
#pragma unroll
    for (int b = 0; b < C::kBlocks; ++b) {
      const int64_t block = b * shape.hidden;
      clear_beyond(shape, row.b, row.length, d.dz, C::kBlocks * shape.hidden, block + from, block + to);
    }
  }

  LLM_EXT_DEVICE void start(const Row& row, float (&carried)[kUnits]) const {
#pragma unroll
    for (int e = 0; e < kUnits; ++e) carried[e] = 0.0f;
    if constexpr (C::kHasCell) {
      const auto given = load_or_zeros<kUnits>(d.grad_c_n, row.b * shape.hidden + unit);
#pragma unroll
      for (int e = 0; e < kUnits; ++e) carried[e] = widen(given.at[e]);
    }
  }

  LLM_EXT_DEVICE void load_inputs(const Row& row, int s, Inputs& inputs) const {
    if (s < 0) return;
    inputs.place = place_of(shape, d.reverse, row.b, row.length, s);
    inputs.grad_y = load_or_zeros<kUnits>(d.grad_y, inputs.place * d.grad_y_stride + unit);
    inputs.step.load_at(shape, d, row.b, row.length, s, inputs.place, unit);
  }

  LLM_EXT_DEVICE void fetch_ahead(const Row& row, int s) const {
    if (s < kStepsAhead) return;
    const int64_t place = place_of(shape, d.reverse, row.b, row.length, s - kStepsAhead);
    if (d.grad_y != nullptr) prefetch(d.grad_y + place * d.grad_y_stride + unit);
    if constexpr (!C::kHasCell) prefetch(d.y + place * d.y_stride + unit);
#pragma unroll
    for (int k = 0; k < C::kKept; ++k) prefetch(d.saved + (place * C::kKept + k) * shape.hidden + unit);
  }

  LLM_EXT_DEVICE void run(const OwnRows& rows, int s, const Inputs (&inputs)[kOwnRows], const Sums (&sums)[kTiles],
                          Carried& carried, Operands (&operands)[kOwnRows]) const {
    float dh[kOwnRows][kUnits], carry[kOwnRows][kUnits], dz[kOwnRows][C::kBlocks][kUnits];
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
      for (int e = 0; e < kUnits; ++e) {
        dh[i][e] = sums[0][kOwnRows * e + i] + widen(inputs[i].grad_y.at[e]);
        carry[i][e] = carried.at[kUnits * i + e];
      }
      // What comes back to a row's last state from outside, once; a row of no steps gives it to its initial state.
      if (s == rows.length[i] - 1 && rows.length[i] >= 0 && d.grad_h_n != nullptr) {
        const auto given = load<kUnits>(d.grad_h_n + (rows.first_b + i) * shape.hidden + unit);
#pragma unroll
        for (int e = 0; e < kUnits; ++e) dh[i][e] += widen(given.at[e]);
      }
    }
    if (s < 0) {  // the product was for the initial state
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        if (rows.length[i] < 0) continue;
        const int64_t at = (rows.first_b + i) * shape.hidden + unit;
#pragma unroll
        for (int e = 0; e < kUnits; ++e) dh[i][e] += C::kCarries && !C::kHasCell ? carry[i][e] : 0.0f;
        if (d.dh0 != nullptr) store(d.dh0 + at, dh[i]);
        if constexpr (C::kHasCell) {
          if (d.dc0 != nullptr) store(d.dc0 + at, carry[i]);
        }
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) inputs[i].step.compute(cell, dh[i], carry[i], dz[i]);
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      if (s >= rows.length[i]) continue;
#pragma unroll
      for (int e = 0; e < kUnits; ++e) {
        carried.at[kUnits * i + e] = carry[i][e];
#pragma unroll
        for (int o = 0; o < kOperands; ++o) {
          operands[i].at[o].at[e] = A::operand(dz[i][C::kBlocks - C::kGates + o][e]);
        }
      }
      inputs[i].step.write(shape, d, inputs[i].place, unit, dz[i]);
    }
  }
};

// A warp's share of U, and its product with a tile of states.
template <typename Job>
struct Weights {
  using A = typename Job::Arithmetic;
  using Operand = typename A::Operand;
  static constexpr int kTiles = Job::kTiles;
  static constexpr int kHeld = held_tiles(Job::kPass) / kTiles;  // column tiles in registers
  // Sums that follow each other wait for each other; two chains where there are too few tiles to fill the wait.
  static constexpr int kChains = kTiles < 3 && A::kSums == 4 ? 2 : 1;

  Words held[kHeld][kTiles][A::kPacks];
  Words* shared;      // of this warp: column tiles from kHeld on
  int first, count;   // column tiles
  int streamed_from;  // of them, the first that is streamed, or count

  LLM_EXT_DEVICE static Words* slot(Words* all, int i, int t, int pack) {
    return all + ((i * kTiles + t) * A::kPacks + pack) * kWarpThreads + lane_index();
  }

  // The lane's part of column tile i, by reading U.
  LLM_EXT_DEVICE void read(const Job& job, int first_unit, int padded, int i, int t, Words (&words)[A::kPacks]) const {
    const int r = lane_index() / 4, q = lane_index() % 4;
    const int column = (first + i) * kTileColumns + 4 * q;
    const int block = column / padded;
    Operand low[4], high[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      low[k] = A::operand(job.weight(t, first_unit + 2 * r, block, column - block * padded + k));
      high[k] = A::operand(job.weight(t, first_unit + 2 * r + 1, block, column - block * padded + k));
    }
    A::pack(low, high, words);
  }

  LLM_EXT_DEVICE void fill(const Job& job, int first_unit, int padded, Words* streamed) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (i < count) read(job, first_unit, padded, i, t, held[i][t]);
      }
    }
#pragma unroll 1
    for (int i = kHeld; i < count; ++i) {
#pragma unroll 1
      for (int t = 0; t < kTiles; ++t) {
        Words words[A::kPacks];
        read(job, first_unit, padded, i, t, words);
        Words* to = i < streamed_from ? slot(shared, i - kHeld, t, 0) : slot(streamed, i - streamed_from, t, 0);
#pragma unroll
        for (int pack = 0; pack < A::kPacks; ++pack) to[pack * kWarpThreads] = words[pack];
      }
    }
  }

  // Adds the products of column tiles [begin, end), which lie in `all`.
  LLM_EXT_DEVICE void add(const Words* all, int begin, int end, const Operand* states, int stride, int rows,
                          float (&sums)[kChains][kTiles][A::kSums]) const {
#pragma unroll 1
    for (int i = begin; i < end; i += kChains) {
#pragma unroll
      for (int chain = 0; chain < kChains; ++chain) {
        if (i + chain >= end) break;
        Words words[kTiles][A::kPacks];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int pack = 0; pack < A::kPacks; ++pack) {
            words[t][pack] = all[(((i - begin + chain) * kTiles + t) * A::kPacks + pack) * kWarpThreads + lane_index()];
          }
        }
        A::multiply(sums[chain], words, states + (i + chain) * kTileColumns, stride, rows);
      }
    }
  }

  // `streamed` says where those lie that have no room on the chip.
  template <typename Streamed>
  LLM_EXT_DEVICE void product(const Operand* states, int stride, int rows, Streamed streamed,
                              float (&own)[kTiles][4]) const {
    float sums[kChains][kTiles][A::kSums] = {};
    const Operand* at = states + first * kTileColumns;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i < count) A::multiply(sums[i % kChains], held[i], at + i * kTileColumns, stride, rows);
    }
    add(shared, kHeld, streamed_from, at, stride, rows, sums);
    if (streamed_from < count) add(streamed(), streamed_from, count, at, stride, rows, sums);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int chain = 1; chain < kChains; ++chain) {
#pragma unroll
        for (int n = 0; n < A::kSums; ++n) sums[0][t][n] += sums[chain][t][n];
      }
      A::finish(sums[0][t], own[t]);
    }
  }
};

template <typename Job>
LLM_EXT_DEVICE void run_tiles(const TileParams<typename Job::Call>& p) {
  using A = typename Job::Arithmetic;
  using Operand = typename A::Operand;
  constexpr int kTiles = Job::kTiles;
  constexpr int kPiece = 16 / sizeof(Operand);  // operands that are copied at once
  const TileLayout& layout = p.layout;
  const RecurrenceShape& shape = p.call.shape;
  const int lane = lane_index(), r = lane / 4, q = lane % 4;
  const int warp = warp_index(), group = warp % p.groups, k_part = warp / p.groups;
  const int part = block_x(), padded = layout.padded, stride = layout.stride;
  const int columns = layout.k_tiles * kTileColumns;
  const int part_unit = part * p.groups * kTileUnits;  // the first of this block
  const int group_unit = part_unit + group * kTileUnits, unit = group_unit + kUnits * r;
  const bool has_units = unit < shape.hidden;
  const bool grid = p.route == Route::kGrid, cluster = p.route == Route::kCluster;
  const bool shares_sum = p.k_parts > 1;

  unsigned char* shared = shared_memory();
  Operand* states = reinterpret_cast<Operand*>(shared + layout.states);
  Pack<float, 4>* sum_slots = reinterpret_cast<Pack<float, 4>*>(shared + layout.sums) + lane;
  Carried* carried_slots = reinterpret_cast<Carried*>(shared + layout.carried) + group * kWarpThreads + lane;
  Mailbox* mailboxes = reinterpret_cast<Mailbox*>(shared + layout.mailboxes);
  int* lengths = reinterpret_cast<int*>(shared + layout.lengths);
  int* tile_lengths = lengths + p.row_tiles * kTileRows;  // the longest row of each tile, -1 if it has none
  const int tile_states = kTileRows * stride;
  const int buffer_states = (grid ? 1 : p.row_tiles) * tile_states;

  const Job job(p.call, unit);
  const auto row_at = [&](int tile, int in_tile) {
    const int b = (block_y() * p.row_tiles + tile) * p.tile_rows + in_tile;
    return Row{b, lengths[tile * kTileRows + in_tile]};
  };

  for (int slot = thread_index(); slot < p.row_tiles * kTileRows; slot += thread_count()) {
    const int in_tile = slot % kTileRows;
    const int b = row_at(slot / kTileRows, in_tile).b;
    lengths[slot] = in_tile < p.tile_rows && b < shape.batch ? length_of(shape, b) : -1;
  }
  for (int i = thread_index(); i < (grid ? 1 : 2) * buffer_states; i += thread_count()) states[i] = Operand{};
  if (cluster && thread_index() < 2) open_mailbox(mailboxes + thread_index());
  block_barrier();

  int steps = -1;  // of the longest row
  for (int tile = 0; tile < p.row_tiles; ++tile) {
    int longest = -1;
    for (int in_tile = 0; in_tile < p.tile_rows; ++in_tile) {
      const Row row = row_at(tile, in_tile);
      longest = row.length > longest ? row.length : longest;
      const int end = part_unit + p.groups * kTileUnits;
      if (row.length >= 0) job.clear(row, part_unit, end < job.hidden ? end : job.hidden);
    }
    if (thread_index() == 0) tile_lengths[tile] = longest;
    steps = longest > steps ? longest : steps;
  }
  // The states that the first product of a tile reads.
  const auto fill_first = [&](int tile, Operand* to) {
#pragma unroll 1
    for (int in_tile = warp; in_tile < kTileRows; in_tile += warp_count()) {
      const Row row = row_at(tile, in_tile);
#pragma unroll 1
      for (int k = lane; k < columns; k += kWarpThreads) {
        const int block = k / padded;
        to[in_tile * stride + k] = A::operand(job.first_operand(row, block, k - block * padded));
      }
    }
  };
  if (!grid) {
    for (int tile = 0; tile < p.row_tiles; ++tile) fill_first(tile, states + tile * tile_states);
  }
  for (int tile = k_part; tile < p.row_tiles; tile += p.k_parts) {
    Carried carried = {};
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const Row row = row_at(tile, kOwnRows * q + i);
      float values[kUnits] = {};
      if (row.length >= 0 && has_units) job.start(row, values);
#pragma unroll
      for (int e = 0; e < kUnits; ++e) carried.at[kUnits * i + e] = values[e];
    }
    if constexpr (Job::kCarries) carried_slots[tile * p.groups * kWarpThreads] = carried;
  }

  Weights<Job> weights;
  weights.first = k_part * layout.k_each;
  weights.count = layout.k_tiles - weights.first < layout.k_each ? layout.k_tiles - weights.first : layout.k_each;
  weights.shared =
      reinterpret_cast<Words*>(shared + layout.weights) + warp * layout.k_shared * kTiles * A::kPacks * kWarpThreads;
  const int on_chip = Weights<Job>::kHeld + layout.k_shared;
  weights.streamed_from = weights.count < on_chip ? weights.count : on_chip;
  // Places in the workspace of a grid are found again at every use, which costs less than registers.
  const auto streamed = [&] {
    const int64_t team = static_cast<int64_t>(block_z()) * grid_y() + block_y();
    return p.streamed + ((team * p.parts + part) * warp_count() + warp_index()) *
                            (layout.k_streamed * kTiles * A::kPacks * kWarpThreads);
  };
  weights.fill(job, group_unit, padded, streamed());

  // Where blocks of a grid meet: of this direction, these rows of the batch, and this tile.
  const auto exchange_at = [&](int buffer, int tile) {
    const int64_t team = static_cast<int64_t>(block_z()) * grid_y() + block_y();
    return static_cast<Operand*>(p.exchange) + ((team * 2 + buffer) * p.row_tiles + tile) * (kTileRows * columns);
  };
  const auto flags_at = [&](int tile) {
    const int64_t team = static_cast<int64_t>(block_z()) * grid_y() + block_y();
    return p.flags + (team * p.row_tiles + tile) * p.parts;
  };

  block_barrier();
  if (cluster) {  // all blocks have begun, and their mailboxes are open
    cluster_arrive();
    cluster_wait();
  }
  if (part >= layout.parts) return;

  const int passes = steps + Job::kExtraSteps;
  int sum_buffer = 0;
#pragma unroll 1
  for (int pass = 0; pass < passes; ++pass) {
    const int s = Job::step_of(pass, steps);
    const bool last = pass == passes - 1;
    Operand* now = states + (grid ? 0 : pass % 2 * buffer_states);
    Operand* next = states + (pass + 1) % 2 * buffer_states;

    int turn = 0;  // whose step it is: tile % k_parts
#pragma unroll 1
    for (int tile = 0; tile < p.row_tiles; ++tile, turn = turn + 1 == p.k_parts ? 0 : turn + 1) {
      const int tile_length = tile_lengths[tile];
      if (s >= tile_length) continue;  // all its rows have ended, or, backward, none has begun
      const bool own_turn = turn == k_part;

      OwnRows rows = {row_at(tile, kOwnRows * q).b, {-1, -1}};
      typename Job::Inputs inputs[kOwnRows] = {};
      if (own_turn && has_units) {
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
          const Row row = row_at(tile, kOwnRows * q + i);
          rows.length[i] = row.length;
          if (s >= row.length) continue;
          job.load_inputs(row, s, inputs[i]);
          // One thread asks for each 32 bytes.
          if (r % (32 / (kUnits * sizeof(Operand))) == 0) job.fetch_ahead(row, s);
        }
      }

      const int before = Job::passes_before(pass, steps, tile_length);
      const Operand* operands = now + (grid ? 0 : tile * tile_states);
      if (grid) {
        if (before == 0) {
          fill_first(tile, now);
        } else {
          for (int i = thread_index(); i < layout.parts; i += thread_count()) await_flag(flags_at(tile) + i, before);
          block_barrier();
          const Operand* from = exchange_at(pass % 2, tile);
#pragma unroll 1
          for (int row = warp; row < kTileRows; row += warp_count()) {
            for (int k = lane * kPiece; k < columns; k += kWarpThreads * kPiece) {
              copy_async(now + row * stride + k, from + row * columns + k);
            }
          }
          copy_async_wait();
        }
        block_barrier();
      } else if (cluster && pass > 0) {
        await_mail(mailboxes + pass % 2, (pass - 1) / 2 % 2);
      }

      Sums sums[kTiles];
      weights.product(operands, stride, p.tile_rows, streamed, sums);

      if (shares_sum) {
        // Every warp but the one whose turn it is leaves its part; two buffers in turn, so one barrier does.
        Pack<float, 4>* slots = sum_slots + sum_buffer * p.groups * p.k_parts * kTiles * kWarpThreads;
        sum_buffer = p.row_tiles > 1 ? 1 - sum_buffer : 0;
        if (!own_turn) {
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            slots[(warp * kTiles + t) * kWarpThreads] = {sums[t][0], sums[t][1], sums[t][2], sums[t][3]};
          }
        }
        block_barrier();
        if (own_turn) {
#pragma unroll 1
          for (int i = 1; i < p.k_parts; ++i) {
            const int other = k_part ^ i;
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
              const Pack<float, 4> theirs = slots[((other * p.groups + group) * kTiles + t) * kWarpThreads];
#pragma unroll
              for (int n = 0; n < 4; ++n) sums[t][n] += theirs.at[n];
            }
          }
        }
      }

      if (own_turn && unit < padded) {
        // Rows and units that have no part in the step give zeros: nothing that is not a number may come from there.
        typename Job::Operands given_on[kOwnRows] = {};
        if (has_units) {
          Carried* slot = carried_slots + tile * p.groups * kWarpThreads;
          Carried carried = {};
          if constexpr (Job::kCarries) carried = *slot;
          job.run(rows, s, inputs, sums, carried, given_on);
          if constexpr (Job::kCarries) *slot = carried;
        }
        if (!last) {
          const int next_stride = grid ? columns : stride;
          Operand* to = grid ? exchange_at((pass + 1) % 2, tile) : next + tile * tile_states;
          to += kOwnRows * q * next_stride + unit;
#pragma unroll
          for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
            for (int o = 0; o < Job::kOperands; ++o) {
              *reinterpret_cast<Pack<Operand, kUnits>*>(to + i * next_stride + o * padded) = given_on[i].at[o];
            }
          }
        }
      }

      if (grid) {
        block_barrier();
        if (thread_index() == 0 && !last) raise_flag(flags_at(tile) + part, before + 1);
      }
    }

    if (grid || last) continue;
    block_barrier();
    if (!cluster) continue;

    // This block's part of the next states into all other blocks, and theirs into this one. A row has `pieces` pieces
    // in each block of operands; lanes are dealt out as if it had 2^piece_bits.
    const int part_units = p.groups * kTileUnits;
    const int pieces = (padded - part_unit < part_units ? padded - part_unit : part_units) / kPiece;
    Mailbox* mailbox = mailboxes + (pass + 1) % 2;
    if (thread_index() == 0) {
      const int got = (padded - pieces * kPiece) * Job::kOperands * p.row_tiles * kTileRows;
      expect_mail(mailbox, got * static_cast<int>(sizeof(Operand)));
    }
#pragma unroll 1
    for (int peer = warp; peer < layout.parts; peer += warp_count()) {
      if (peer == part) continue;
#pragma unroll 1
      for (int i = lane; i < p.row_tiles * kTileRows << layout.piece_bits; i += kWarpThreads) {
        const int slot = i >> layout.piece_bits, piece = i - (slot << layout.piece_bits);
        if (piece >= pieces) continue;
        Operand* at = next + slot * stride + part_unit + piece * kPiece;
#pragma unroll
        for (int o = 0; o < Job::kOperands; ++o) {
          Words* words = reinterpret_cast<Words*>(at + o * padded);
          send(words, *words, mailbox, peer);
        }
      }
    }
  }
}

template <typename A, typename C>
LLM_EXT_KERNEL(max_warps(A::kType) * kWarpThreads)
void tile_forward(LLM_EXT_PARAMS TileParams<RecurrenceForward<typename A::Stored>> p) {
  run_tiles<ForwardJob<A, C>>(p);
}

template <typename A, typename C>
LLM_EXT_KERNEL(max_warps(A::kType) * kWarpThreads)
void tile_backward(LLM_EXT_PARAMS TileParams<RecurrenceBackward<typename A::Stored>> p) {
  run_tiles<BackwardJob<A, C>>(p);
}

template <typename Call>
int launch_tiles(void (*kernel)(TileParams<Call>), const Call& call, Pass pass, Type type, const Plan& plan,
                 void* stream) {
  const RecurrenceShape& s = call.shape;
  const Problem problem = {s.mode, pass, type, s.steps, s.batch, s.hidden, s.output, s.directions, plan.tf32};
  TileParams<Call> params = {};
  params.call = call;
  params.route = plan.route;
  params.parts = plan.parts;
  params.groups = plan.groups;
  params.k_parts = plan.k_parts;
  params.tile_rows = plan.tile_rows;
  params.row_tiles = plan.row_tiles;
  params.layout = tile_layout(problem, plan);
  if (plan.route == Route::kGrid) {
    const GridWorkspace bytes = grid_workspace(problem, plan);
    unsigned char* at = static_cast<unsigned char*>(call.workspace);
    params.flags = reinterpret_cast<uint32_t*>(at);
    params.exchange = at + bytes.flags;
    params.streamed = reinterpret_cast<Words*>(at + bytes.flags + bytes.states);
    const int error = zero(params.flags, bytes.flags, stream);
    if (error != 0) return error;
  }
  LaunchShape shape;
  shape.grid_x = static_cast<unsigned>(plan.parts);
  shape.grid_y = static_cast<unsigned>(plan.row_groups);
  shape.grid_z = static_cast<unsigned>(s.directions);
  shape.threads = static_cast<unsigned>(plan.groups * plan.k_parts * kWarpThreads);
  shape.cluster = plan.route == Route::kCluster ? static_cast<unsigned>(plan.parts) : 1;
  shape.shared_bytes = static_cast<size_t>(params.layout.bytes);
  shape.all_resident = plan.route == Route::kGrid;
  return launch(kernel, shape, params, stream);
}

}  // namespace cuda
}  // namespace llm_ext
