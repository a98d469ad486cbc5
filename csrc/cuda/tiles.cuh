// The recurrence with U held on the chip: one launch for the whole sequence, one loop for three routes, forward and
// backward.
//
// What a block owns. The units are dealt out in groups of 16 to `parts` blocks; a block holds the rows (backward:
// columns) of U of its groups for the whole call, first in registers, then in shared memory, and does the steps of its
// units for row_tiles tiles of up to 8 rows of the batch. Other rows belong to other blocks, which hold the same part
// of U (grid y), and the other direction to yet others (grid z).
//
// What a warp owns. Group warp % groups, and the tiles of columns of its share warp / groups of the sum. Where several
// warps share a sum, they leave their parts in shared memory, and for tile j the warp of share j % k_parts adds them up
// and does the step. What a thread owns: two neighbouring units (rows r and r + 8 of a tile of weights are units 2 r
// and 2 r + 1 of the group) of two neighbouring rows of the batch, all gates of them; so the step needs no exchange.
// What it carries from step to step is kept in float, in a place of its own in shared memory.
//
// What passes between blocks at each step are the operands of the next product: h forward, H numbers a row; dz
// backward, G H numbers a row. By route:
//   block    nothing: one block has all units. One or two barriers of the block a step.
//   cluster  each block writes its part into the shared memory of all others, 16 bytes a thread at a time, and a
//   barrier
//            of the cluster ends the step. Two buffers in turn, so one barrier does.
//   grid     each block writes its part into the workspace (it stays in the second-level cache) and raises a flag for
//            this tile of rows; who needs the tile awaits the flags of all parts and copies it. There is no barrier of
//            the grid: a block that works at one tile does not wait for those who work at another. Nobody can write
//            over what is still read: a buffer is written again two steps later, which needs everybody's part of the
//            step between, and everybody gives that after having read.
//
// Counted, for a block and step of one tile of rows: 2 x 16 x 16 x 8 operations for each of its groups x k_tiles x
// tiles tiles of weights; shared memory read: 512 bytes (16 bits) or 1 KB for each tile of weights that is not in
// registers, and 256 or 512 bytes of states for each column tile and group. Memory of the device: what the steps read
// (gates_x; or kept, grad_y) and write (y, kept; or dz), once each, asked for two steps ahead.
//
// Sources: persistent RNNs, Diamos et al. 2016, for U in registers; the rest follows from counting.
#pragma once

#include "cuda/arithmetic.cuh"
#include "cuda/cells.cuh"
#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/steps.cuh"
#include "cuda/tiles.h"

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
  uint32_t* flags;  // grid: as flag_bytes() says, all 0
  void* exchange;   // grid: as flag_bytes() says
};

// A row of the batch as the kernel sees it; length is -1 where there is none.
struct Row {
  int b;
  int length;
};

// The forward pass: tiles of weights are the gates of a group, the sum goes over h.
template <typename A, typename C>
struct ForwardJob {
  using Arithmetic = A;
  using S = typename A::Stored;
  using Call = RecurrenceForward<S>;
  static constexpr Pass kPass = Pass::kForward;
  static constexpr int kTiles = C::kGates;
  static constexpr int kOperands = 1;  // blocks of H operands a row
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
        cell{call.shape.cell} {}

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

  LLM_EXT_DEVICE void run(const Row& row, int s, const Inputs& inputs, const float (&sums)[kTiles][kUnits],
                          float (&carried)[kUnits], float (&operands)[kOperands][kUnits]) const {
    float product[kTiles][kUnits], c[kUnits], h[kUnits];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      // Always in the first-level cache, where it costs no registers.
      const Pack<S, kUnits> bias = load_or_zeros<kUnits>(d.b_hh, t * shape.hidden + unit);
#pragma unroll
      for (int e = 0; e < kUnits; ++e) product[t][e] = sums[t][e] + widen(bias.at[e]);
    }
#pragma unroll
    for (int e = 0; e < kUnits; ++e) c[e] = carried[e];
    inputs.step.run(cell, shape, d, inputs.place, unit, product, carried, c, h);
    store(d.y + inputs.place * d.y_stride + unit, h);
    if (s == row.length - 1) {
      store(d.h_n + row.b * shape.hidden + unit, h);
      if constexpr (C::kHasCell) store(d.c_n + row.b * shape.hidden + unit, c);
    }
#pragma unroll
    for (int e = 0; e < kUnits; ++e) {
      carried[e] = C::kHasCell ? c[e] : h[e];
      operands[0][e] = h[e];
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
        cell{call.shape.cell} {}

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
    for (int k = 0; k < C::kKept; ++k) prefetch(d.kept + (place * C::kKept + k) * shape.hidden + unit);
  }

  LLM_EXT_DEVICE void run(const Row& row, int s, const Inputs& inputs, const float (&sums)[kTiles][kUnits],
                          float (&carried)[kUnits], float (&operands)[kOperands][kUnits]) const {
    const int64_t at = row.b * shape.hidden + unit;
    float dh[kUnits];
#pragma unroll
    for (int e = 0; e < kUnits; ++e) dh[e] = sums[0][e];
    // What comes back to a row's last state from outside; a row of no steps gives it to its initial state.
    if (s == row.length - 1) {
      const auto given = load_or_zeros<kUnits>(d.grad_h_n, at);
#pragma unroll
      for (int e = 0; e < kUnits; ++e) dh[e] += widen(given.at[e]);
    }
    if (s < 0) {
#pragma unroll
      for (int e = 0; e < kUnits; ++e) dh[e] += C::kCarries && !C::kHasCell ? carried[e] : 0.0f;
      store_if_wanted(d.dh0, at, dh);
      if constexpr (C::kHasCell) store_if_wanted(d.dc0, at, carried);
      return;
    }
#pragma unroll
    for (int e = 0; e < kUnits; ++e) dh[e] += widen(inputs.grad_y.at[e]);
    float dz[C::kBlocks][kUnits];
    inputs.step.run(cell, shape, d, inputs.place, unit, dh, carried, dz);
#pragma unroll
    for (int o = 0; o < kOperands; ++o) {
#pragma unroll
      for (int e = 0; e < kUnits; ++e) operands[o][e] = dz[C::kBlocks - C::kGates + o][e];
    }
  }
};

// A warp's share of U, and its product with a tile of states.
template <typename Job>
struct Weights {
  using A = typename Job::Arithmetic;
  using Operand = typename A::Operand;
  static constexpr int kTiles = Job::kTiles;
  static constexpr int kHeld = held_columns(Job::kPass, kTiles);  // column tiles in registers
  // Sums that follow each other wait for each other; two chains where there are too few tiles to fill the wait.
  static constexpr int kChains = kTiles < 3 && A::kSums == 4 ? 2 : 1;

  Words held[kHeld][kTiles][A::kPacks];
  Words* shared;     // of this warp
  int first, count;  // column tiles

  LLM_EXT_DEVICE static Words* slot(Words* shared, int i, int t, int pack) {
    return shared + ((i * kTiles + t) * A::kPacks + pack) * kWarpThreads + lane_index();
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

  LLM_EXT_DEVICE void fill(const Job& job, int first_unit, int padded) {
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
#pragma unroll
        for (int pack = 0; pack < A::kPacks; ++pack) *slot(shared, i - kHeld, t, pack) = words[pack];
      }
    }
  }

  LLM_EXT_DEVICE void product(const Operand* states, int stride, int rows, float (&own)[kTiles][4]) const {
    float sums[kChains][kTiles][A::kSums] = {};
    const Operand* at = states + first * kTileColumns;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i < count) A::multiply(sums[i % kChains], held[i], at + i * kTileColumns, stride, rows);
    }
#pragma unroll 1
    for (int i = kHeld; i < count; i += kChains) {
#pragma unroll
      for (int chain = 0; chain < kChains; ++chain) {
        if (i + chain >= count) break;
        Words words[kTiles][A::kPacks];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int pack = 0; pack < A::kPacks; ++pack) words[t][pack] = *slot(shared, i + chain - kHeld, t, pack);
        }
        A::multiply(sums[chain], words, at + (i + chain) * kTileColumns, stride, rows);
      }
    }
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
  const TileLayout& layout = p.layout;
  const RecurrenceShape& shape = p.call.shape;
  const int lane = lane_index(), r = lane / 4, q = lane % 4;
  const int warp = warp_index(), group = warp % p.groups, k_part = warp / p.groups;
  const int part = block_x(), padded = layout.padded, stride = layout.stride;
  const int part_units = p.groups * kTileUnits;
  const int group_unit = part * part_units + group * kTileUnits, unit = group_unit + kUnits * r;
  const bool has_units = unit < shape.hidden;
  const int columns = layout.k_tiles * kTileColumns;
  const bool grid = p.route == Route::kGrid;

  Operand* states = reinterpret_cast<Operand*>(shared_memory() + layout.states);
  Pack<float, 4>* sum_slots = reinterpret_cast<Pack<float, 4>*>(shared_memory() + layout.sums);
  Pack<float, 4>* carried_slots = reinterpret_cast<Pack<float, 4>*>(shared_memory() + layout.carried);
  int* lengths = reinterpret_cast<int*>(shared_memory() + layout.lengths);
  const int buffer_states = (grid ? 1 : p.row_tiles) * kTileRows * stride;
  const int buffers = grid ? 1 : 2;

  const Job job(p.call, unit);
  const auto row_at = [&](int slot) {
    const int tile = slot / kTileRows, in_tile = slot % kTileRows;
    const int b = (block_y() * p.row_tiles + tile) * p.tile_rows + in_tile;
    return Row{b, lengths[slot]};
  };

  for (int slot = thread_index(); slot < p.row_tiles * kTileRows; slot += thread_count()) {
    const int b = row_at(slot).b;
    const bool exists = slot % kTileRows < p.tile_rows && b < shape.batch;
    lengths[slot] = exists ? length_of(shape, b) : -1;
  }
  for (int i = thread_index(); i < buffers * buffer_states; i += thread_count()) states[i] = A::operand(0.0f);
  block_barrier();

  int steps = -1;
  for (int slot = 0; slot < p.row_tiles * kTileRows; ++slot) {
    const Row row = row_at(slot);
    steps = row.length > steps ? row.length : steps;
    if (row.length < 0) continue;
    const int from = part * part_units, to = from + part_units;
    job.clear(row, from, to < job.hidden ? to : job.hidden);
  }
  // The states that the first product of a tile reads, into the buffer from there on.
  const auto fill_first = [&](int tile, Operand* to) {
    for (int in_tile = warp; in_tile < kTileRows; in_tile += warp_count()) {
      const Row row = row_at(tile * kTileRows + in_tile);
      for (int k = lane; k < columns; k += kWarpThreads) {
        const int block = k / padded;
        to[in_tile * stride + k] = A::operand(job.first_operand(row, block, k - block * padded));
      }
    }
  };
  if (!grid) {
    for (int tile = 0; tile < p.row_tiles; ++tile) fill_first(tile, states + tile * kTileRows * stride);
  }
  for (int tile = k_part; tile < p.row_tiles; tile += p.k_parts) {
    Pack<float, 4> carried = {};
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const Row row = row_at(tile * kTileRows + kOwnRows * q + i);
      float values[kUnits] = {};
      if (row.length >= 0 && has_units) job.start(row, values);
#pragma unroll
      for (int e = 0; e < kUnits; ++e) carried.at[kUnits * i + e] = values[e];
    }
    if constexpr (Job::kCarries) carried_slots[(tile * p.groups + group) * kWarpThreads + lane] = carried;
  }

  Weights<Job> weights;
  weights.first = k_part * layout.k_each;
  weights.count = layout.k_tiles - weights.first < layout.k_each ? layout.k_tiles - weights.first : layout.k_each;
  weights.shared = reinterpret_cast<Words*>(shared_memory() + layout.weights) +
                   warp * layout.k_shared * kTiles * A::kPacks * kWarpThreads;
  weights.fill(job, group_unit, padded);

  // Where blocks of a grid meet: of this direction and these rows of the batch.
  const int64_t team = static_cast<int64_t>(block_z()) * grid_y() + block_y();
  const int64_t exchange_states = static_cast<int64_t>(p.row_tiles) * kTileRows * columns;
  Operand* exchange = static_cast<Operand*>(p.exchange) + team * 2 * exchange_states;
  uint32_t* flags = p.flags + team * p.row_tiles * p.parts;

  block_barrier();
  if (p.route == Route::kCluster) {  // all blocks have begun, and have their first states
    cluster_arrive();
    cluster_wait();
  }

  const int passes = steps + Job::kExtraSteps;
  int tiles_done = 0;
#pragma unroll 1
  for (int pass = 0; pass < passes; ++pass) {
    const int s = Job::step_of(pass, steps);
    const bool last = pass == passes - 1;
    Operand* now = states + (grid ? 0 : pass % 2 * buffer_states);
    Operand* next = grid ? exchange + (pass + 1) % 2 * exchange_states : states + (pass + 1) % 2 * buffer_states;
    const int next_stride = grid ? columns : stride;

#pragma unroll 1
    for (int tile = 0; tile < p.row_tiles; ++tile) {
      int tile_steps = -1;
#pragma unroll
      for (int i = 0; i < kTileRows; ++i) {
        const int length = lengths[tile * kTileRows + i];
        tile_steps = length > tile_steps ? length : tile_steps;
      }
      if (s >= tile_steps) continue;  // all its rows have ended, or, backward, none has begun

      const bool owner = tile % p.k_parts == k_part && has_units;
      typename Job::Inputs inputs[kOwnRows];
      if (owner) {
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
          const Row row = row_at(tile * kTileRows + kOwnRows * q + i);
          if (s >= row.length) continue;
          job.load_inputs(row, s, inputs[i]);
          // One thread asks for each 32 bytes.
          if (r % (32 / (kUnits * sizeof(Operand))) == 0) job.fetch_ahead(row, s);
        }
      }

      Operand* tile_states = now + (grid ? 0 : tile * kTileRows * stride);
      const int before = Job::passes_before(pass, steps, tile_steps);
      if (grid) {
        if (before == 0) {
          fill_first(tile, tile_states);
        } else {
          for (int i = thread_index(); i < p.parts; i += thread_count()) await_flag(flags + tile * p.parts + i, before);
          block_barrier();
          const Operand* from = exchange + pass % 2 * exchange_states + tile * kTileRows * columns;
          constexpr int kPiece = 16 / sizeof(Operand);
          for (int row = warp; row < kTileRows; row += warp_count()) {
            for (int k = lane * kPiece; k < columns; k += kWarpThreads * kPiece) {
              copy_async(tile_states + row * stride + k, from + row * columns + k);
            }
          }
          copy_async_wait();
        }
        block_barrier();
      }

      float sums[kTiles][4];
      weights.product(tile_states, stride, p.tile_rows, sums);

      if (p.k_parts > 1) {
        const int warps = p.groups * p.k_parts;
        Pack<float, 4>* slots =
            sum_slots + (p.row_tiles > 1 ? tiles_done % 2 : 0) * warps * kTiles * kWarpThreads + lane;
        ++tiles_done;
        if (tile % p.k_parts != k_part) {
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            slots[(warp * kTiles + t) * kWarpThreads] = {sums[t][0], sums[t][1], sums[t][2], sums[t][3]};
          }
        }
        block_barrier();
        if (tile % p.k_parts == k_part) {
          for (int other = 0; other < p.k_parts; ++other) {
            if (other == k_part) continue;
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
              const Pack<float, 4> theirs = slots[((other * p.groups + group) * kTiles + t) * kWarpThreads];
#pragma unroll
              for (int n = 0; n < 4; ++n) sums[t][n] += theirs.at[n];
            }
          }
        }
      }

      if (tile % p.k_parts == k_part && unit < padded) {
        Pack<float, 4>* slot = carried_slots + (tile * p.groups + group) * kWarpThreads + lane;
        Pack<float, 4> carried = {};
        if constexpr (Job::kCarries) carried = *slot;
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
          const int in_tile = kOwnRows * q + i;
          const Row row = row_at(tile * kTileRows + in_tile);
          float operands[Job::kOperands][kUnits] = {};
          if (has_units && s < row.length) {
            float own[kTiles][kUnits], values[kUnits];
#pragma unroll
            for (int e = 0; e < kUnits; ++e) {
#pragma unroll
              for (int t = 0; t < kTiles; ++t) own[t][e] = sums[t][2 * e + i];
              values[e] = carried.at[kUnits * i + e];
            }
            job.run(row, s, inputs[i], own, values, operands);
#pragma unroll
            for (int e = 0; e < kUnits; ++e) carried.at[kUnits * i + e] = values[e];
          }
          if (last) continue;
          // Rows that have no part in the step give zeros: nothing that is not a number may come from there.
          Operand* to = next + (tile * kTileRows + in_tile) * next_stride + unit;
#pragma unroll
          for (int o = 0; o < Job::kOperands; ++o) {
            Pack<Operand, kUnits> pair;
#pragma unroll
            for (int e = 0; e < kUnits; ++e) pair.at[e] = A::operand(operands[o][e]);
            *reinterpret_cast<Pack<Operand, kUnits>*>(to + o * padded) = pair;
          }
        }
        if constexpr (Job::kCarries) *slot = carried;
      }

      if (grid) {
        block_barrier();
        if (thread_index() == 0 && !last) raise_flag(flags + tile * p.parts + part, before + 1);
      }
    }

    if (grid || last) continue;
    block_barrier();
    if (p.route == Route::kBlock) continue;

    // This block's part of the next states, 16 bytes at a time, into all other blocks of the cluster.
    constexpr int kPiece = 16 / sizeof(Operand);
    const int from = part * part_units;
    const int pieces = (from + part_units < padded ? part_units : padded - from) / kPiece;  // a row and block; or none
    for (int peer = warp; peer < p.parts; peer += warp_count()) {
      if (peer == part) continue;
      Operand* to = in_block(next, peer);
      for (int i = lane; i < pieces * p.row_tiles * kTileRows; i += kWarpThreads) {
        const int slot = i / pieces;
#pragma unroll
        for (int o = 0; o < Job::kOperands; ++o) {
          const int at = slot * stride + o * padded + from + (i - slot * pieces) * kPiece;
          *reinterpret_cast<Words*>(to + at) = *reinterpret_cast<const Words*>(next + at);
        }
      }
    }
    cluster_arrive();
    cluster_wait();
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
  const Problem problem = {s.cell, pass, type, s.steps, s.batch, s.hidden, s.output, s.directions, plan.tf32};
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
    const int64_t bytes = flag_bytes(problem, plan);
    params.flags = static_cast<uint32_t*>(call.workspace);
    params.exchange = static_cast<unsigned char*>(call.workspace) + bytes;
    const int error = zero(params.flags, bytes, stream);
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
