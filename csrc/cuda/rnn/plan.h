// The choice of kernel for a recurrence and its partition over blocks, from shape and device. Plain C++, testable
// without a GPU.
#pragma once

#include <cstdint>

#include "cuda/device_facts.h"
#include "params/rnn.h"

namespace llm_ext {
namespace cuda {

// generic: any size and type; U is read from memory at every step. The other routes hold U on the chip and differ in
// the blocks that share it: one block; a thread-block cluster, which exchanges states through distributed shared
// memory; or a block group of the grid, which exchanges them through the L2 cache, with flags.
enum class Route : int { kGeneric = 0, kBlock = 1, kCluster = 2, kGrid = 3 };
enum class Pass : int { kForward = 0, kBackward = 1 };
enum class Type : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// One launch. Sizes are those of RecurrenceShape (launchers.h).
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
  // All routes but generic:
  int group_blocks = 1;  // blocks of a block group, which share U; the last may have no units
  int unit_groups = 0;   // groups of 16 units per block
  int k_splits = 1;      // warps that share the sum of a unit group, a power of two
  int tile_rows = 0;     // batch rows per tile, at most 8
  int row_tiles = 0;     // tiles per block
  int streamed = 0;      // column tiles of each warp's weights that do not fit on the chip (grid only)
  int block_groups = 0;  // per direction: each holds U and has other batch rows
  int64_t shared_bytes = 0;
};

// The plan with the lowest estimated time. `wanted` forces a route, for tests and measurements: if the route cannot run
// the problem, the plan is generic.
Plan make_plan(const Problem& problem, const DeviceFacts& facts);
Plan make_plan(const Problem& problem, const DeviceFacts& facts, Route wanted);

// Bytes of workspace for a launch with this plan.
int64_t workspace_bytes(const Problem& problem, const Plan& plan);

}  // namespace cuda
}  // namespace llm_ext
