// What the host and the kernels of tiles (tiles.cuh) have to agree on. Plain C++.
#pragma once

#include <cstdint>

#include "cuda/rnn/launchers.h"

namespace llm_ext {
namespace cuda {

constexpr int kTileUnits = 16;    // units a group: the rows of a tile of weights
constexpr int kTileColumns = 16;  // columns of weights, or of states, a tile
constexpr int kTileRows = 8;      // rows of the batch a tile, at most

// Warps a block, at most: 16 have 128 registers a thread, 8 have 255.
constexpr int max_warps(Type type) { return type == Type::kFloat32 ? 8 : 16; }
// Tiles of weights that a warp holds in registers, 4 of a thread for each in 16 bits, 8 in 32. More of them, and some
// kernel would spill (make cuda-check).
constexpr int held_tiles(Pass pass) { return pass == Pass::kForward ? 12 : 10; }
constexpr int64_t bytes_of(Type type) { return type == Type::kFloat64 ? 8 : (type == Type::kFloat32 ? 4 : 2); }

// Shapes and places in the shared memory of a block, in bytes where not said otherwise.
struct TileLayout {
  int padded;      // H, up to whole tiles
  int k_tiles;     // tiles of columns of the whole sum
  int k_each;      // of them, those of a warp
  int k_shared;    // of those, how many stay in shared memory because registers are full
  int k_streamed;  // and how many in the workspace because shared memory is full
  int parts;       // of the blocks that share the units, those that have any
  int piece_bits;  // 2^piece_bits pieces of 16 bytes have room for a block's part of a row of operands
  int stride;      // operands from one row of the states to the next
  int states;      // [1 or 2 buffers][row_tiles or 1][kTileRows][stride] operands: h, or dz backward
  int weights;     // [warps][k_shared][tiles][lanes]
  int sums;        // [1 or 2 buffers][warps][tiles][lanes] sums on their way from warp to warp; nothing if k_parts is 1
  int carried;     // [row_tiles][groups][lanes] what passes from step to step in float
  int mailboxes;   // [2] of 8 bytes
  int lengths;     // [row_tiles][kTileRows] int, then [row_tiles]
  int bytes;
};

TileLayout tile_layout(const Problem& problem, const Plan& plan);

// The workspace of the grid's route, one after the other, each on 256 bytes: flags [teams][row_tiles][parts]; states
// [teams][2][row_tiles][kTileRows][k_tiles kTileColumns]; streamed weights
// [teams][parts][warps][k_streamed][tiles][lanes]. There are directions x row_groups teams.
struct GridWorkspace {
  int64_t flags, states, weights;  // bytes of each
};
GridWorkspace grid_workspace(const Problem& problem, const Plan& plan);

template <typename S>
int tile_recurrence(const RecurrenceForward<S>& call, const Plan& plan, void* stream);
template <typename S>
int tile_recurrence(const RecurrenceBackward<S>& call, const Plan& plan, void* stream);

// How many clusters of so many blocks run at the same time, each with all the shared memory a block may ask for.
int resident_tile_clusters(int blocks, int64_t shared_bytes);

}  // namespace cuda
}  // namespace llm_ext
