// Which kernel runs a recurrence, and how it shares the work: a rule from shape and device. Plain C++, no GPU needed.
#pragma once

#include <cstdint>

#include "params/attention.h"
#include "params/linear.h"
#include "params/pooling.h"
#include "params/rnn.h"

namespace llm_ext {
namespace cuda {

// generic: any size and type, U read from memory at every step. The others hold U on the chip and differ in how many
// blocks share it: one; a thread-block cluster, which exchanges states through distributed shared memory; or a part of
// the grid, which exchanges them through the second-level cache, with flags.
enum class Route : int { kGeneric = 0, kBlock = 1, kCluster = 2, kGrid = 3 };
enum class Pass : int { kForward = 0, kBackward = 1 };
enum class Type : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

constexpr int kClusterSizes = 5;  // of 1, 2, 4, 8 and 16 blocks

struct DeviceFacts {
  int sm = 0;                                 // 10 major + minor
  int sm_count = 0;                           // multiprocessors
  int64_t shared_bytes = 0;                   // the most shared memory that a block may ask for
  int resident_clusters[kClusterSizes] = {};  // clusters of 2^i such blocks that run at the same time; 0: none
};

// What is to be run. See kernels.h for the letters.
struct Problem {
  Mode mode;
  Pass pass;
  Type type;
  int64_t steps;
  int64_t batch;
  int64_t hidden;
  int64_t output;
  int directions;
  bool allow_tf32;  // float32 may be multiplied as TF32
};

struct Plan {
  Route route = Route::kGeneric;
  bool tf32 = false;
  // All but generic. A block has `groups` groups of 16 units, and `row_tiles` tiles of tile_rows batch rows.
  int parts = 1;       // blocks that share the units; the last may have none
  int groups = 0;      // groups of 16 units a block
  int k_parts = 1;     // warps that share the sum of one group, a power of two
  int tile_rows = 0;   // batch rows a tile, 8 at most
  int row_tiles = 0;   // tiles a block
  int streamed = 0;    // column tiles of each warp's weights for which there is no room on the chip (grid only)
  int row_groups = 0;  // times that U is on the chip, each for other batch rows
  int64_t shared_bytes = 0;
};

// The plan of least estimated time. `wanted` forces a route, for tests and measurements: if that cannot run the
// problem, the plan is generic.
Plan make_plan(const Problem& problem, const DeviceFacts& facts);
Plan make_plan(const Problem& problem, const DeviceFacts& facts, Route wanted);

// Bytes of workspace for a launch by this plan.
int64_t workspace_bytes(const Problem& problem, const Plan& plan);

}  // namespace cuda
}  // namespace llm_ext
