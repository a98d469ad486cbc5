// The rule that plan.h promises: every way to share the work that fits is estimated, and the least is taken.
//
// The estimate is in clocks a step, from what is counted and a few rates and waits of sm_80 and sm_90 as published.
// None of them has been measured with these kernels yet; they only have to put routes into the right order.
#include "cuda/rnn/plan.h"

#include <algorithm>

#include "cuda/rnn/generic.h"
#include "cuda/rnn/tiles.h"

namespace llm_ext {
namespace cuda {
namespace {

constexpr int64_t kWarpLanes = 32;
constexpr int64_t kMaxGridY = 65535;
constexpr int64_t kMaxBatch = int64_t{1} << 24;  // rows and places of rows are counted in int

constexpr double kSharedBytesAClock = 128;  // a multiprocessor
constexpr double kL2BytesAClock = 32;       // to a multiprocessor, while all others read as well
constexpr double kStepWait = 250;           // the chain of operations of one step, if nothing else is in the way
constexpr double kSchedulers = 4;           // of a multiprocessor, an instruction of a warp a clock each
constexpr double kSumClocks = 60;           // a barrier and a round through shared memory
constexpr double kBlockClocks = 60;         // a barrier of the block
constexpr double kClusterClocks = 700;      // a barrier, stores to shared memory of others, and their arrival
constexpr double kGridClocks = 2200;        // to the second-level cache, a flag, and back

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles of weights of one group that share a tile of states, and blocks of H numbers that the sum goes over.
int tiles_of(const Problem& p) { return p.pass == Pass::kForward ? gates_of(p.mode) : 1; }
int operands_of(const Problem& p) { return p.pass == Pass::kForward ? 1 : gates_of(p.mode); }
bool carries(const Problem& p) { return p.mode == Mode::kGru || p.mode == Mode::kLstm; }
// Bytes of a tile of weights; it has as many numbers as its fragment.
int64_t tile_bytes(const Problem& p) { return kTileUnits * kTileColumns * bytes_of(p.type); }

// Clocks of a multiprocessor that multiply one tile of weights with one of states, and those of a warp alone.
struct MultiplyClocks {
  double shared;
  double alone;
};
MultiplyClocks multiply_clocks(const Problem& p, bool tf32, int rows) {
  if (p.type != Type::kFloat32) return {2, 16};
  if (tf32) return {4, 32};
  const int pairs = 2 * ((rows + 1) / 2);
  return {2.0 * pairs, 8.0 * pairs};  // 256 multiply-adds a row, 128 a clock, 32 a clock and warp
}

// Instructions of a warp for the step of its 16 units and 8 rows, as compiled for sm_90, to the nearest 50.
double step_instructions(Mode mode) { return mode == Mode::kLstm ? 450 : (mode == Mode::kGru ? 350 : 200); }

double step_clocks(const Problem& p, const Plan& plan, const TileLayout& layout) {
  const MultiplyClocks multiply = multiply_clocks(p, plan.tf32, plan.tile_rows);
  const double warps = plan.groups * plan.k_parts;
  const double tiles = layout.k_each * tiles_of(p);  // of weights, a warp
  const double states = static_cast<double>(layout.k_each) * kTileRows * kTileColumns * bytes_of(p.type);
  const double weights = static_cast<double>(layout.k_shared) * tiles_of(p) * tile_bytes(p);
  double tile = std::max(warps * tiles * multiply.shared, tiles * multiply.alone);
  tile = std::max(tile, warps * (states + weights) / kSharedBytesAClock);
  tile += std::max(kStepWait, plan.groups * step_instructions(p.mode) / kSchedulers);
  if (plan.k_parts > 1) tile += kSumClocks + plan.k_parts * tiles_of(p) * 4.0;
  if (plan.route == Route::kGrid) {
    const double copied = static_cast<double>(layout.k_tiles) * kTileRows * kTileColumns * bytes_of(p.type);
    tile += (copied + warps * layout.k_streamed * tiles_of(p) * tile_bytes(p)) / kL2BytesAClock;
  }
  const double exchange = plan.route == Route::kBlock     ? kBlockClocks
                          : plan.route == Route::kCluster ? kClusterClocks
                                                          : kGridClocks;
  return exchange + plan.row_tiles * tile;
}

// How many teams of `parts` blocks run at the same time, for each direction.
int64_t teams_of(const Problem& p, const DeviceFacts& facts, Route route, int parts) {
  int64_t teams = facts.sm_count / parts;
  if (route == Route::kCluster) {
    int i = 0;
    while (i < kClusterSizes && (1 << i) != parts) ++i;
    teams = i < kClusterSizes && facts.sm >= 90 ? facts.resident_clusters[i] : 0;
  }
  return teams / p.directions;
}

struct Best {
  Plan plan;
  double clocks = -1;
};

// Considers the plan for `parts` blocks a team, with every share of the sum and every size of tiles.
void consider(const Problem& p, const DeviceFacts& facts, Route route, int parts, Best* best) {
  const int64_t all_groups = ceil_div(p.hidden, kTileUnits);
  const int64_t teams = teams_of(p, facts, route, parts);
  const int64_t groups = ceil_div(all_groups, parts);
  if (parts > all_groups || groups > max_warps(p.type) || teams < 1) return;
  const bool fewer_rows_pay = p.type == Type::kFloat32 && !p.allow_tf32;
  for (int k_parts = 1; groups * k_parts <= max_warps(p.type); k_parts *= 2) {
    for (int tile_rows = fewer_rows_pay ? 2 : kTileRows; tile_rows <= kTileRows; tile_rows *= 2) {
      const int64_t tiles = ceil_div(p.batch, tile_rows);
      for (int64_t row_tiles = ceil_div(tiles, teams); row_tiles >= 1; row_tiles = row_tiles > 1 ? row_tiles / 2 : 0) {
        Plan plan;
        plan.route = route;
        plan.tf32 = p.type == Type::kFloat32 && p.allow_tf32;
        plan.parts = parts;
        plan.groups = static_cast<int>(groups);
        plan.k_parts = k_parts;
        plan.tile_rows = tile_rows;
        plan.row_tiles = static_cast<int>(row_tiles);
        const int64_t row_groups = ceil_div(tiles, row_tiles);
        if (row_groups > kMaxGridY || (route == Route::kGrid && row_groups > teams)) continue;
        plan.row_groups = static_cast<int>(row_groups);
        TileLayout layout = tile_layout(p, plan);
        if (layout.bytes > facts.shared_bytes && route == Route::kGrid) {
          const int64_t a_tile = groups * k_parts * tiles_of(p) * tile_bytes(p);  // a column tile of each warp
          plan.streamed =
              static_cast<int>(std::min<int64_t>(layout.k_shared, ceil_div(layout.bytes - facts.shared_bytes, a_tile)));
          layout = tile_layout(p, plan);
        }
        plan.shared_bytes = layout.bytes;
        if (plan.shared_bytes > facts.shared_bytes) continue;
        const double clocks = static_cast<double>(ceil_div(row_groups, teams)) * step_clocks(p, plan, layout);
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
  // Of the numbers of blocks that give each as many groups, the least.
  const int64_t all_groups = ceil_div(p.hidden, kTileUnits);
  for (int groups = max_warps(p.type); grid && groups >= 1; --groups) {
    const int64_t parts = ceil_div(all_groups, groups);
    if (parts > 1 && parts <= facts.sm_count) consider(p, facts, Route::kGrid, static_cast<int>(parts), &best);
  }
  return best.plan;
}

}  // namespace

TileLayout tile_layout(const Problem& p, const Plan& plan) {
  const int64_t tiles = tiles_of(p), warps = plan.groups * plan.k_parts, size = bytes_of(p.type);
  const bool grid = plan.route == Route::kGrid;
  const int64_t padded = ceil_div(p.hidden, kTileColumns) * kTileColumns;
  const int64_t columns = operands_of(p) * padded;
  TileLayout layout = {};
  layout.padded = static_cast<int>(padded);
  layout.k_tiles = static_cast<int>(columns / kTileColumns);
  layout.k_each = static_cast<int>(ceil_div(layout.k_tiles, plan.k_parts));
  layout.k_shared = std::max(0, layout.k_each - held_tiles(p.pass) / tiles_of(p) - plan.streamed);
  layout.k_streamed = plan.streamed;
  layout.parts = static_cast<int>(ceil_div(padded, plan.groups * kTileUnits));
  while ((16 << layout.piece_bits) < plan.groups * kTileUnits * size) ++layout.piece_bits;
  // An odd number of column tiles, so that rows of states lie in different banks.
  layout.stride = static_cast<int>(columns + (columns % 32 == 0 ? 16 : 0));

  int64_t at = 0;
  const auto place = [&](int64_t bytes) {
    const int64_t begin = at;
    at += bytes;
    return static_cast<int>(begin);
  };
  layout.states = place((grid ? 1 : 2 * plan.row_tiles) * kTileRows * layout.stride * size);
  layout.weights = place(warps * layout.k_shared * tiles * tile_bytes(p));
  const int64_t sum_buffers = plan.k_parts == 1 ? 0 : (plan.row_tiles > 1 ? 2 : 1);
  layout.sums = place(sum_buffers * warps * tiles * kWarpLanes * 16);
  layout.carried = place(carries(p) ? plan.row_tiles * plan.groups * kWarpLanes * 16 : 0);
  layout.mailboxes = place(2 * 8);
  layout.lengths = place(plan.row_tiles * (kTileRows + 1) * 4);
  layout.bytes = static_cast<int>(std::min<int64_t>(at, int64_t{1} << 30));
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
  const int64_t teams = static_cast<int64_t>(p.directions) * plan.row_groups;
  const int64_t states = 2 * plan.row_tiles * kTileRows * static_cast<int64_t>(layout.k_tiles) * kTileColumns;
  const int64_t weights = static_cast<int64_t>(plan.parts) * plan.groups * plan.k_parts * layout.k_streamed;
  const auto whole = [&](int64_t bytes_a_team) { return ceil_div(teams * bytes_a_team, 256) * 256; };
  return {whole(plan.row_tiles * plan.parts * 4), whole(states * bytes_of(p.type)),
          whole(weights * tiles_of(p) * tile_bytes(p))};
}

int64_t workspace_bytes(const Problem& p, const Plan& plan) {
  if (plan.route == Route::kGeneric) {
    const int64_t blocks = ceil_div(p.batch, kGenericRows) * p.directions;
    const int64_t numbers = p.pass == Pass::kForward ? generic_forward_scratch(p.hidden, p.output)
                                                     : generic_backward_scratch(gates_of(p.mode), p.hidden, p.output);
    return blocks * numbers * (p.type == Type::kFloat64 ? 8 : 4);
  }
  if (plan.route != Route::kGrid) return 0;
  const GridWorkspace workspace = grid_workspace(p, plan);
  return workspace.flags + workspace.states + workspace.weights;
}

}  // namespace cuda
}  // namespace llm_ext
