// Sizes and layouts on which the host and the tile kernels (tiles.cuh) agree. Plain C++.
#pragma once

#include <cstdint>

#include "cuda/rnn/launchers.h"

namespace llm_ext {
namespace cuda {

constexpr int kTileUnits = 16;    // units per unit group: the rows of a weight tile
constexpr int kTileColumns = 16;  // columns of a weight or state tile
constexpr int kTileRows = 8;      // batch rows per tile, at most

// Warps per block, at most: 16 with 128 registers per thread, 8 with 255.
constexpr int max_warps(Type type) { return type == Type::kFloat32 ? 8 : 16; }
// Weight tiles that a warp holds in registers, each 4 registers per thread in 16 bits and 8 in 32 bits. With more of
// them some kernel spills (make cuda-check).
constexpr int held_tiles(Pass pass) { return pass == Pass::kForward ? 12 : 10; }
constexpr int64_t bytes_of(Type type) { return type == Type::kFloat64 ? 8 : (type == Type::kFloat32 ? 4 : 2); }

// Sizes, and offsets in a block's shared memory in bytes.
struct TileLayout {
  int padded;         // H, rounded up to whole tiles
  int k_tiles;        // column tiles of the whole sum
  int k_each;         // column tiles per warp
  int k_shared;       // column tiles per warp in shared memory: those that do not fit in registers
  int k_streamed;     // column tiles per warp in the workspace: those that do not fit in shared memory
  int active_blocks;  // blocks of a group that have units
  int piece_bits;     // 2^piece_bits pieces of 16 bytes hold a block's operands of one row
  int stride;         // operands between rows of the states
  int states;         // [1 or 2 buffers][row_tiles or 1][kTileRows][stride] operands: h; backward dz
  int weights;        // [warps][k_shared][tiles][lanes]
  int sums;           // [1 or 2 buffers][warps][tiles][lanes] partial sums; empty if k_splits is 1
  int carried;        // [row_tiles][unit_groups][lanes] floats carried from step to step
  int mbarriers;      // [2], 8 bytes each
  int lengths;        // [row_tiles][kTileRows] int, then [row_tiles]
  int bytes;
};

TileLayout tile_layout(const Problem& problem, const Plan& plan);

// Bytes of the sections of the grid route's workspace, in this order, each rounded up to 256: flags
// [block groups][row_tiles][group_blocks]; states [block groups][2][row_tiles][kTileRows][k_tiles kTileColumns];
// streamed weights [block groups][group_blocks][warps][k_streamed][tiles][lanes]. There are
// directions x block_groups block groups.
struct GridWorkspace {
  int64_t flags, states, weights;
};
GridWorkspace grid_workspace(const Problem& problem, const Plan& plan);

template <typename S>
int tile_recurrence(const RecurrenceForward<S>& call, const Plan& plan, void* stream);
template <typename S>
int tile_recurrence(const RecurrenceBackward<S>& call, const Plan& plan, void* stream);

// The number of clusters of `blocks` blocks, each with `shared_bytes` of shared memory, that run at the same time.
int resident_tile_clusters(int blocks, int64_t shared_bytes);

}  // namespace cuda
}  // namespace llm_ext
