// What the host and the kernels of tiles (tiles.cuh) have to agree on. Plain C++.
#pragma once

#include <cstdint>

#include "cuda/kernels.h"

namespace llm_ext {
namespace cuda {

constexpr int kTileUnits = 16;    // units a group: the rows of a tile of weights
constexpr int kTileColumns = 16;  // columns of weights, or of states, a tile
constexpr int kTileRows = 8;      // rows of the batch a tile, at most

// Warps a block, at most: 16 have 128 registers a thread, 8 have 255.
constexpr int max_warps(Type type) { return type == Type::kFloat32 ? 8 : 16; }
// Column tiles of weights that a warp holds in registers, `tiles` tiles of weights each: up to 64 registers of a thread
// in 16 bits, 128 in 32, and no more than leave the rest of the kernel without a spill (make cuda-check).
constexpr int held_columns(Pass pass, int tiles) {
  return pass == Pass::kBackward ? 12 : (tiles == 1 ? 16 : (tiles == 3 ? 4 : 3));
}
constexpr int64_t bytes_of(Type type) { return type == Type::kFloat64 ? 8 : (type == Type::kFloat32 ? 4 : 2); }

// Shapes and places in the shared memory of a block, in bytes where not said otherwise.
struct TileLayout {
  int padded;    // H, up to whole tiles
  int k_tiles;   // tiles of columns of the whole sum
  int k_each;    // of them, those of a warp
  int k_shared;  // of those, how many stay in shared memory because registers are full
  int stride;    // operands from one row of the states to the next
  int states;    // [1 or 2 buffers][row_tiles or 1][kTileRows][stride] operands: h, or dz backward
  int weights;   // [warps][k_shared][tiles][lanes]
  int sums;      // [1 or 2 buffers][warps][tiles][lanes] sums on their way from warp to warp; nothing if k_parts is 1
  int carried;   // [row_tiles][groups][lanes] what passes from step to step in float
  int lengths;   // [row_tiles][kTileRows] int
  int bytes;
};

TileLayout tile_layout(const Problem& problem, const Plan& plan);

// The workspace of the grid's route: flags [directions][row_groups][row_tiles][parts], then, at this many bytes, states
// [directions][row_groups][2][row_tiles][kTileRows][k_tiles kTileColumns].
int64_t flag_bytes(const Problem& problem, const Plan& plan);

template <typename S>
int tile_recurrence(const RecurrenceForward<S>& call, const Plan& plan, void* stream);
template <typename S>
int tile_recurrence(const RecurrenceBackward<S>& call, const Plan& plan, void* stream);

// How many clusters of so many blocks run at the same time, each with all the shared memory a block may ask for.
int resident_tile_clusters(int blocks, int64_t shared_bytes);

}  // namespace cuda
}  // namespace llm_ext
