// Estimates every partition that fits and takes the fastest.
//
// The estimate counts clocks per step, from operation counts and published rates and latencies of sm_80 and sm_90. They
// only have to rank the routes; kStepLatency alone was measured.
#include "cuda/rnn/plan.h"

#include <algorithm>

#include "cuda/rnn/generic.h"
#include "cuda/rnn/tiles.h"

namespace llm_ext {
namespace cuda {
namespace {

constexpr int64_t kWarpLanes = 32;
constexpr int64_t kMaxGridY = 65535;
constexpr int64_t kMaxBatch = int64_t{1} << 24;  // row indices are int

constexpr double kSharedBytesPerClock = 128;  // of one multiprocessor
constexpr double kL2BytesPerClock = 32;       // to one multiprocessor, while all others read
constexpr double kDsmemBytesPerClock = 12;    // that a multiprocessor receives from the others of its cluster
constexpr double kStepLatency = 2400;         // of the step of a tile; H200, 2026-11-29, docs/lab/cuda-h200.md
constexpr double kSchedulers = 4;             // of a multiprocessor, one warp instruction per clock each
constexpr double kSumClocks = 60;             // a barrier and a round trip through shared memory
constexpr double kBlockClocks = 60;           // a barrier of the block
constexpr double kClusterClocks = 700;        // a barrier, asynchronous DSMEM stores and the arrival of the first
constexpr double kGridClocks = 2200;          // a store to the L2 cache, a flag, and a load

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Weight tiles of a unit group that share a state tile, and blocks of H numbers in the sum.
int tiles_of(const Problem& p) { return p.pass == Pass::kForward ? gates_of(p.mode) : 1; }
int operands_of(const Problem& p) { return p.pass == Pass::kForward ? 1 : gates_of(p.mode); }
bool carries(const Problem& p) { return p.mode == Mode::kGru || p.mode == Mode::kLstm; }
// Bytes of a weight tile.
int64_t tile_bytes(const Problem& p) { return kTileUnits * kTileColumns * bytes_of(p.type); }

// Clocks of the product of a weight tile and a state tile.
struct MultiplyClocks {
  double shared;  // throughput of a busy multiprocessor
  double alone;   // latency of a single warp
};
MultiplyClocks multiply_clocks(const Problem& p, bool tf32, int rows) {
  if (p.type != Type::kFloat32) return {2, 16};
  if (tf32) return {4, 32};
  const int pairs = 2 * ((rows + 1) / 2);
  return {2.0 * pairs, 8.0 * pairs};  // 256 multiply-adds per row; 128 per clock, 32 per clock and warp
}

// Instructions of a warp for the step of 16 units and 8 rows, counted in sm_90 code and rounded to 50.
double step_instructions(Mode mode) { return mode == Mode::kLstm ? 450 : (mode == Mode::kGru ? 350 : 200); }

double step_clocks(const Problem& p, const Plan& plan, const TileLayout& layout) {
  const MultiplyClocks multiply = multiply_clocks(p, plan.tf32, plan.tile_rows);
  const double warps = plan.unit_groups * plan.k_splits;
  const double tiles = layout.k_each * tiles_of(p);  // weight tiles per warp
  const double states = static_cast<double>(layout.k_each) * kTileRows * kTileColumns * bytes_of(p.type);
  const double weights = static_cast<double>(layout.k_shared) * tiles_of(p) * tile_bytes(p);
  const double operands =
      static_cast<double>(layout.k_tiles) * kTileRows * kTileColumns * bytes_of(p.type);  // a tile's
  double tile = std::max(warps * tiles * multiply.shared, tiles * multiply.alone);
  tile = std::max(tile, warps * (states + weights) / kSharedBytesPerClock);
  // The latency is that of one warp a scheduler; the instructions of others come on top.
  tile += kStepLatency + std::max(0.0, plan.unit_groups / kSchedulers - 1) * step_instructions(p.mode);
  if (plan.k_splits > 1) tile += kSumClocks + plan.k_splits * tiles_of(p) * 4.0;
  if (plan.route == Route::kGrid) {
    tile += (operands + warps * layout.k_streamed * tiles_of(p) * tile_bytes(p)) / kL2BytesPerClock;
  }
  double exchange = plan.route == Route::kBlock ? kBlockClocks : kGridClocks;
  if (plan.route == Route::kCluster) {
    const double others = 1 - 1.0 / layout.active_blocks;
    exchange = kClusterClocks + plan.row_tiles * others * operands / kDsmemBytesPerClock;
  }
  return exchange + plan.row_tiles * tile;
}

// The number of groups of `group_blocks` blocks that run at the same time, per direction.
int64_t resident_block_groups(const Problem& p, const DeviceFacts& facts, Route route, int group_blocks) {
  int64_t resident = facts.sm_count / group_blocks;
  if (route == Route::kCluster) {
    int i = 0;
    while (i < kClusterSizes && (1 << i) != group_blocks) ++i;
    resident = i < kClusterSizes && facts.sm >= 90 ? facts.resident_clusters[i] : 0;
  }
  return resident / p.directions;
}

struct Best {
  Plan plan;
  double clocks = -1;
};

// Considers plans with groups of `group_blocks` blocks: every split of the sum, every tile size.
void consider(const Problem& p, const DeviceFacts& facts, Route route, int group_blocks, Best* best) {
  const int64_t all_unit_groups = ceil_div(p.hidden, kTileUnits);
  const int64_t resident = resident_block_groups(p, facts, route, group_blocks);
  const int64_t unit_groups = ceil_div(all_unit_groups, group_blocks);
  if (group_blocks > all_unit_groups || unit_groups > max_warps(p.type) || resident < 1) return;
  const bool fewer_rows_pay = p.type == Type::kFloat32 && !p.allow_tf32;
  for (int k_splits = 1; unit_groups * k_splits <= max_warps(p.type); k_splits *= 2) {
    for (int tile_rows = fewer_rows_pay ? 2 : kTileRows; tile_rows <= kTileRows; tile_rows *= 2) {
      const int64_t tiles = ceil_div(p.batch, tile_rows);
      for (int64_t row_tiles = ceil_div(tiles, resident); row_tiles >= 1;
           row_tiles = row_tiles > 1 ? row_tiles / 2 : 0) {
        Plan plan;
        plan.route = route;
        plan.tf32 = p.type == Type::kFloat32 && p.allow_tf32;
        plan.group_blocks = group_blocks;
        plan.unit_groups = static_cast<int>(unit_groups);
        plan.k_splits = k_splits;
        plan.tile_rows = tile_rows;
        plan.row_tiles = static_cast<int>(row_tiles);
        const int64_t block_groups = ceil_div(tiles, row_tiles);
        if (block_groups > kMaxGridY || (route == Route::kGrid && block_groups > resident)) continue;
        plan.block_groups = static_cast<int>(block_groups);
        TileLayout layout = tile_layout(p, plan);
        if (layout.bytes > facts.shared_bytes && route == Route::kGrid) {
          const int64_t column_bytes =
              unit_groups * k_splits * tiles_of(p) * tile_bytes(p);  // one column tile per warp
          plan.streamed = static_cast<int>(
              std::min<int64_t>(layout.k_shared, ceil_div(layout.bytes - facts.shared_bytes, column_bytes)));
          layout = tile_layout(p, plan);
        }
        plan.shared_bytes = layout.bytes;
        if (plan.shared_bytes > facts.shared_bytes) continue;
        const double clocks = static_cast<double>(ceil_div(block_groups, resident)) * step_clocks(p, plan, layout);
        if (best->clocks < 0 || clocks < best->clocks) *best = {plan, clocks};
      }
    }
  }
}

Plan plan_of_routes(const Problem& p, const DeviceFacts& facts, bool block, bool cluster, bool grid) {
  const bool fits = p.type != Type::kFloat64 && p.output == p.hidden && p.hidden % 2 == 0 && p.hidden > 0 &&
                    p.batch > 0 && p.batch <= kMaxBatch && p.hidden <= kMaxBatch && facts.sm >= 80;
  Best best;
  if (!fits) return best.plan;
  if (block) consider(p, facts, Route::kBlock, 1, &best);
  for (int i = 1; cluster && i < kClusterSizes; ++i) consider(p, facts, Route::kCluster, 1 << i, &best);
  // For each number of unit groups per block, the fewest blocks.
  const int64_t all_unit_groups = ceil_div(p.hidden, kTileUnits);
  for (int unit_groups = max_warps(p.type); grid && unit_groups >= 1; --unit_groups) {
    const int64_t group_blocks = ceil_div(all_unit_groups, unit_groups);
    if (group_blocks > 1 && group_blocks <= facts.sm_count)
      consider(p, facts, Route::kGrid, static_cast<int>(group_blocks), &best);
  }
  return best.plan;
}

}  // namespace

TileLayout tile_layout(const Problem& p, const Plan& plan) {
  const int64_t tiles = tiles_of(p), warps = plan.unit_groups * plan.k_splits, size = bytes_of(p.type);
  const bool grid = plan.route == Route::kGrid;
  const int64_t padded = ceil_div(p.hidden, kTileColumns) * kTileColumns;
  const int64_t columns = operands_of(p) * padded;
  TileLayout layout = {};
  layout.padded = static_cast<int>(padded);
  layout.k_tiles = static_cast<int>(columns / kTileColumns);
  layout.k_each = static_cast<int>(ceil_div(layout.k_tiles, plan.k_splits));
  layout.k_shared = std::max(0, layout.k_each - held_tiles(p.pass) / tiles_of(p) - plan.streamed);
  layout.k_streamed = plan.streamed;
  layout.active_blocks = static_cast<int>(ceil_div(padded, plan.unit_groups * kTileUnits));
  while ((16 << layout.piece_bits) < plan.unit_groups * kTileUnits * size) ++layout.piece_bits;
  // An odd number of column tiles puts the rows of states into different banks.
  layout.stride = static_cast<int>(columns + (columns % 32 == 0 ? 16 : 0));

  int64_t end = 0;
  const auto append = [&](int64_t bytes) {
    const int64_t begin = end;
    end += bytes;
    return static_cast<int>(begin);
  };
  layout.states = append((grid ? 1 : 2 * plan.row_tiles) * kTileRows * layout.stride * size);
  layout.weights = append(warps * layout.k_shared * tiles * tile_bytes(p));
  const int64_t sum_buffers = plan.k_splits == 1 ? 0 : (plan.row_tiles > 1 ? 2 : 1);
  layout.sums = append(sum_buffers * warps * tiles * kWarpLanes * 16);
  layout.carried = append(carries(p) ? plan.row_tiles * plan.unit_groups * kWarpLanes * 16 : 0);
  layout.mbarriers = append(2 * 8);
  layout.lengths = append(plan.row_tiles * (kTileRows + 1) * 4);
  layout.bytes = static_cast<int>(std::min<int64_t>(end, int64_t{1} << 30));
  return layout;
}

Plan make_plan(const Problem& problem, const DeviceFacts& facts) {
  return plan_of_routes(problem, facts, true, true, true);
}

Plan make_plan(const Problem& problem, const DeviceFacts& facts, Route wanted) {
  return plan_of_routes(problem, facts, wanted == Route::kBlock, wanted == Route::kCluster, wanted == Route::kGrid);
}

GridWorkspace grid_workspace(const Problem& p, const Plan& plan) {
  const TileLayout layout = tile_layout(p, plan);
  const int64_t block_groups = static_cast<int64_t>(p.directions) * plan.block_groups;
  const int64_t states = 2 * plan.row_tiles * kTileRows * static_cast<int64_t>(layout.k_tiles) * kTileColumns;
  const int64_t weights =
      static_cast<int64_t>(plan.group_blocks) * plan.unit_groups * plan.k_splits * layout.k_streamed;
  const auto section = [&](int64_t bytes) { return ceil_div(block_groups * bytes, 256) * 256; };
  return {section(plan.row_tiles * plan.group_blocks * 4), section(states * bytes_of(p.type)),
          section(weights * tiles_of(p) * tile_bytes(p))};
}

int64_t workspace_bytes(const Problem& p, const Plan& plan) {
  if (plan.route == Route::kGeneric) {
    const int64_t blocks = ceil_div(p.batch, kGenericRows) * p.directions;
    const int64_t elements = p.pass == Pass::kForward ? generic_forward_scratch(p.hidden, p.output)
                                                      : generic_backward_scratch(gates_of(p.mode), p.hidden, p.output);
    return blocks * elements * (p.type == Type::kFloat64 ? 8 : 4);
  }
  if (plan.route != Route::kGrid) return 0;
  const GridWorkspace workspace = grid_workspace(p, plan);
  return workspace.flags + workspace.states + workspace.weights;
}

}  // namespace cuda
}  // namespace llm_ext
