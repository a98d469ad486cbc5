// The recurrence with U held on the chip: one launch per sequence and one loop for three routes, forward and backward.
//
// Blocks. A block group of `group_blocks` blocks shares the units, in unit groups of 16. A block holds the rows
// (backward: columns) of U of its unit groups during the whole call: in registers first, then in shared memory; what
// exceeds both (grid only) is stored in the workspace and read at every step. It runs the steps of its units for
// row_tiles tiles of up to 8 batch rows. Other batch rows belong to other block groups (grid y), which hold U again,
// and the other direction to other block groups, too (grid z).
//
// Warps. A warp has unit group warp % unit_groups and the column tiles of slice warp / unit_groups of the sum. Where
// several warps share a sum, they leave partial sums in shared memory; for tile j the warp of slice j % k_splits adds
// them and runs the step.
//
// Threads. A thread has two adjacent units (rows r and r + 8 of a weight tile are units 2 r and 2 r + 1 of the unit
// group) of two adjacent batch rows with all their gates, so that the step needs no exchange. Values carried from step
// to step are floats in shared memory.
//
// At each step, blocks exchange the operands of the next product: h forward (H numbers per row), dz backward (G H):
//
// - block: no exchange, one block has all units. One or two block barriers per step.
// - cluster: each block writes its operands to the shared memory of all others by asynchronous DSMEM stores, 16 bytes
//   per thread. An mbarrier counts the bytes; a block continues once the expected bytes have arrived. There is only one
//   barrier of the cluster, at the start: its fence waits for all stores to global memory.
// - grid: each block writes its operands to the workspace (they stay in the L2 cache) and raises a flag per row tile. A
//   block that needs the tile awaits the flags of all blocks of its group and copies it. There is no grid barrier:
//   blocks that work on one tile do not wait for those that work on another.
//
// Clusters and grids use two buffers alternately, without a signal that a buffer may be overwritten. A buffer is reused
// two steps later, which requires the operands of the step in between from every block, and a block produces those only
// after it has read the buffer.
//
// Cost per block, step and row tile: 2 x 16 x 16 x 8 operations for each weight tile (unit_groups x k_tiles x tiles of
// them); from shared memory, 512 bytes (16 bits) or 1 KB for each weight tile that is not in registers, and 256 or 512
// bytes of states for each column tile and unit group. Global memory: gates_x (backward: saved, grad_y) is read and y,
// saved (backward: dz) written once, prefetched two steps ahead.
//
// U in registers: Diamos et al., "Persistent RNNs", 2016.
#pragma once

#include "cuda/device.cuh"
#include "cuda/rnn/arithmetic.cuh"
#include "cuda/rnn/launchers.h"
#include "cuda/rnn/tile_jobs.cuh"
#include "cuda/rnn/tile_weights.cuh"
#include "cuda/rnn/tiles.h"

namespace llm_ext {
namespace cuda {

template <typename Call>
struct TileParams {
  Call call;
  Route route;
  int group_blocks, unit_groups, k_splits, tile_rows, row_tiles;  // as in Plan
  TileLayout layout;
  // Grid route only, laid out by grid_workspace(); flags are 0.
  uint32_t* flags;
  void* exchange;
  Words* streamed;
};
template <typename Job>
LLM_EXT_DEVICE void run_tiles(const TileParams<typename Job::Call>& p) {
  using A = typename Job::Arithmetic;
  using Operand = typename A::Operand;
  constexpr int kTiles = Job::kTiles;
  constexpr int kPiece = 16 / sizeof(Operand);  // operands of one copy
  const TileLayout& layout = p.layout;
  const RecurrenceShape& shape = p.call.shape;
  const int lane = lane_index(), r = lane / 4, q = lane % 4;
  const int warp = warp_index(), group = warp % p.unit_groups, k_split = warp / p.unit_groups;
  const int group_rank = block_x(), padded = layout.padded, stride = layout.stride;
  const int columns = layout.k_tiles * kTileColumns;
  const int block_unit = group_rank * p.unit_groups * kTileUnits;  // the block's first
  const int group_unit = block_unit + group * kTileUnits, unit = group_unit + kUnits * r;
  const bool has_units = unit < shape.hidden;
  const bool grid = p.route == Route::kGrid, cluster = p.route == Route::kCluster;
  const bool shares_sum = p.k_splits > 1;

  unsigned char* shared = shared_memory();
  Operand* states = reinterpret_cast<Operand*>(shared + layout.states);
  Pack<float, 4>* sum_slots = reinterpret_cast<Pack<float, 4>*>(shared + layout.sums) + lane;
  Carried* carried_slots = reinterpret_cast<Carried*>(shared + layout.carried) + group * kWarpThreads + lane;
  Mbarrier* mbarriers = reinterpret_cast<Mbarrier*>(shared + layout.mbarriers);
  int* lengths = reinterpret_cast<int*>(shared + layout.lengths);
  int* tile_lengths = lengths + p.row_tiles * kTileRows;  // the longest row of each tile; -1 if it has no rows
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
  if (cluster && thread_index() < 2) init_mbarrier(mbarriers + thread_index());
  block_barrier();

  int steps = -1;  // of the longest row
  for (int tile = 0; tile < p.row_tiles; ++tile) {
    int longest = -1;
    for (int in_tile = 0; in_tile < p.tile_rows; ++in_tile) {
      const Row row = row_at(tile, in_tile);
      longest = row.length > longest ? row.length : longest;
      const int end = block_unit + p.unit_groups * kTileUnits;
      if (row.length >= 0) job.clear(row, block_unit, end < job.hidden ? end : job.hidden);
    }
    if (thread_index() == 0) tile_lengths[tile] = longest;
    steps = longest > steps ? longest : steps;
  }
  // Writes the operands of a tile's first product.
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
  for (int tile = k_split; tile < p.row_tiles; tile += p.k_splits) {
    Carried carried = {};
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const Row row = row_at(tile, kOwnRows * q + i);
      float values[kUnits] = {};
      if (row.length >= 0 && has_units) job.start(row, values);
#pragma unroll
      for (int e = 0; e < kUnits; ++e) carried.at[kUnits * i + e] = values[e];
    }
    if constexpr (Job::kCarries) carried_slots[tile * p.unit_groups * kWarpThreads] = carried;
  }

  Weights<Job> weights;
  weights.first = k_split * layout.k_each;
  weights.count = layout.k_tiles - weights.first < layout.k_each ? layout.k_tiles - weights.first : layout.k_each;
  weights.shared =
      reinterpret_cast<Words*>(shared + layout.weights) + warp * layout.k_shared * kTiles * A::kPacks * kWarpThreads;
  const int on_chip = Weights<Job>::kHeld + layout.k_shared;
  weights.streamed_from = weights.count < on_chip ? weights.count : on_chip;
  // Addresses in the workspace are recomputed at every use to save registers.
  const auto streamed = [&] {
    const int64_t block_group = static_cast<int64_t>(block_z()) * grid_y() + block_y();
    return p.streamed + ((block_group * p.group_blocks + group_rank) * warp_count() + warp_index()) *
                            (layout.k_streamed * kTiles * A::kPacks * kWarpThreads);
  };
  weights.fill(job, group_unit, padded, streamed());

  // Exchange buffers and flags of this block group (grid only).
  const auto exchange_at = [&](int buffer, int tile) {
    const int64_t block_group = static_cast<int64_t>(block_z()) * grid_y() + block_y();
    return static_cast<Operand*>(p.exchange) +
           ((block_group * 2 + buffer) * p.row_tiles + tile) * (kTileRows * columns);
  };
  const auto flags_at = [&](int tile) {
    const int64_t block_group = static_cast<int64_t>(block_z()) * grid_y() + block_y();
    return p.flags + (block_group * p.row_tiles + tile) * p.group_blocks;
  };

  block_barrier();
  if (cluster) {  // all blocks run and their mbarriers are initialized
    cluster_arrive();
    cluster_wait();
  }
  if (group_rank >= layout.active_blocks) return;

  const int passes = steps + Job::kExtraSteps;
  int sum_buffer = 0;
#pragma unroll 1
  for (int pass = 0; pass < passes; ++pass) {
    const int s = Job::step_of(pass, steps);
    const bool last = pass == passes - 1;
    Operand* now = states + (grid ? 0 : pass % 2 * buffer_states);
    Operand* next = states + (pass + 1) % 2 * buffer_states;

    int turn = 0;  // the slice whose warp runs the step: tile % k_splits
#pragma unroll 1
    for (int tile = 0; tile < p.row_tiles; ++tile, turn = turn + 1 == p.k_splits ? 0 : turn + 1) {
      const int tile_length = tile_lengths[tile];
      if (s >= tile_length) continue;  // all its rows have ended; backward: none has begun
      const bool own_turn = turn == k_split;

      OwnRows rows = {row_at(tile, kOwnRows * q).b, {-1, -1}};
      typename Job::Inputs inputs[kOwnRows] = {};
      typename Job::Bias bias = {};
      if (own_turn && has_units) {
        if constexpr (Job::kBiasAhead) job.load_bias(bias);
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
          const Row row = row_at(tile, kOwnRows * q + i);
          rows.length[i] = row.length;
          if (s >= row.length) continue;
          job.load_inputs(row, s, inputs[i]);
          // One thread prefetches each 32 bytes.
          if (r % (32 / (kUnits * sizeof(Operand))) == 0) job.fetch_ahead(row, s);
        }
      }

      const int before = Job::passes_before(pass, steps, tile_length);
      const Operand* operands = now + (grid ? 0 : tile * tile_states);
      if (grid) {
        if (before == 0) {
          fill_first(tile, now);
        } else {
          for (int i = thread_index(); i < layout.active_blocks; i += thread_count())
            await_flag(flags_at(tile) + i, before);
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
        wait_mbarrier(mbarriers + pass % 2, (pass - 1) / 2 % 2);
      }

      Sums sums[kTiles];
      weights.product(operands, stride, p.tile_rows, streamed, sums);

      if (shares_sum) {
        // Every other warp leaves its partial sums. With two alternating buffers one barrier suffices.
        Pack<float, 4>* slots = sum_slots + sum_buffer * p.unit_groups * p.k_splits * kTiles * kWarpThreads;
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
          for (int i = 1; i < p.k_splits; ++i) {
            const int other = k_split ^ i;
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
              const Pack<float, 4> theirs = slots[((other * p.unit_groups + group) * kTiles + t) * kWarpThreads];
#pragma unroll
              for (int n = 0; n < 4; ++n) sums[t][n] += theirs.at[n];
            }
          }
        }
      }

      if (own_turn && unit < padded) {
        // Inactive rows and units pass zeros on: NaN there would spread through the product.
        typename Job::Operands operands_out[kOwnRows] = {};
        if (has_units) {
          Carried* slot = carried_slots + tile * p.unit_groups * kWarpThreads;
          Carried carried = {};
          if constexpr (Job::kCarries) carried = *slot;
          if constexpr (!Job::kBiasAhead) job.load_bias(bias);
          job.run(rows, s, bias, inputs, sums, carried, operands_out);
          if constexpr (Job::kCarries) *slot = carried;
        }
        const auto write = [&](Operand* to, int to_stride) {
          to += kOwnRows * q * to_stride + unit;
#pragma unroll
          for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
            for (int o = 0; o < Job::kOperands; ++o) {
              operands_out[i].at[o].store(to + i * to_stride + o * padded);
            }
          }
        };
        if (!last && grid) write(exchange_at((pass + 1) % 2, tile), columns);
        if (!last && !grid) write(next + tile * tile_states, stride);
      }

      if (grid) {
        block_barrier();
        if (thread_index() == 0 && !last) raise_flag(flags_at(tile) + group_rank, before + 1);
      }
    }

    if (grid || last) continue;
    block_barrier();
    if (!cluster) continue;

    // Store this block's operands to all other blocks. A row has `pieces` pieces per block of operands; lanes are
    // assigned as if it had 2^piece_bits.
    const int block_units = p.unit_groups * kTileUnits;
    const int pieces = (padded - block_unit < block_units ? padded - block_unit : block_units) / kPiece;
    Mbarrier* mbarrier = mbarriers + (pass + 1) % 2;
    if (thread_index() == 0) {
      const int expected = (padded - pieces * kPiece) * Job::kOperands * p.row_tiles * kTileRows;
      expect_bytes(mbarrier, expected * static_cast<int>(sizeof(Operand)));
    }
#pragma unroll 1
    for (int peer = warp; peer < layout.active_blocks; peer += warp_count()) {
      if (peer == group_rank) continue;
#pragma unroll 1
      for (int i = lane; i < p.row_tiles * kTileRows << layout.piece_bits; i += kWarpThreads) {
        const int slot = i >> layout.piece_bits, piece = i - (slot << layout.piece_bits);
        if (piece >= pieces) continue;
        Operand* at = next + slot * stride + block_unit + piece * kPiece;
#pragma unroll
        for (int o = 0; o < Job::kOperands; ++o) {
          Words* words = reinterpret_cast<Words*>(at + o * padded);
          store_dsmem_async(words, *words, mbarrier, peer);
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
  params.group_blocks = plan.group_blocks;
  params.unit_groups = plan.unit_groups;
  params.k_splits = plan.k_splits;
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
  shape.grid_x = plan.group_blocks;
  shape.grid_y = plan.block_groups;
  shape.grid_z = s.directions;
  shape.threads = static_cast<unsigned>(plan.unit_groups * plan.k_splits * kWarpThreads);
  shape.cluster = plan.route == Route::kCluster ? static_cast<unsigned>(plan.group_blocks) : 1;
  shape.shared_bytes = static_cast<size_t>(params.layout.bytes);
  shape.all_resident = plan.route == Route::kGrid;
  return launch(kernel, shape, params, stream);
}

}  // namespace cuda
}  // namespace llm_ext
