// Runs the recurrence of a request, once per seed: forward, then backward if the request has gradients. Results must
// have the same bits in every order of the threads.
#include <algorithm>
#include <cinttypes>

#include "cuda/device_facts.h"
#include "cuda/rnn/launchers.h"
#include "cuda/rnn/tiles.h"
#include "device.h"
#include "outputs.h"

namespace {

using namespace llm_ext;
using namespace llm_ext::cuda;
using emulator::Answer;
using emulator::expect;
using emulator::Outputs;
using emulator::Records;

class Workspace {
 public:
  Workspace(const Problem& problem, const Plan& plan) {
    const int64_t bytes = workspace_bytes(problem, plan);
    if (bytes) data_ = emulator::device_memory(static_cast<size_t>(bytes), 256);
  }
  ~Workspace() {
    if (data_) emulator::free_device_memory(data_);
  }
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

Plan plan_of(const Records& request, const Problem& problem) {
  DeviceFacts facts;
  expect(device_facts(0, &facts), "device_facts");
  const int64_t route = request.number("route", -1);
  if (request.has("group_blocks")) {  // a given plan instead of make_plan()'s
    Plan plan;
    plan.route = static_cast<Route>(route);
    plan.tf32 = problem.allow_tf32 && problem.type == Type::kFloat32;
    plan.group_blocks = static_cast<int>(request.number("group_blocks"));
    plan.unit_groups =
        static_cast<int>((problem.hidden + plan.group_blocks * kTileUnits - 1) / (plan.group_blocks * kTileUnits));
    plan.k_splits = static_cast<int>(request.number("k_splits"));
    plan.tile_rows = static_cast<int>(request.number("tile_rows"));
    plan.row_tiles = static_cast<int>(request.number("row_tiles"));
    // At most the column tiles that do not fit in registers.
    plan.streamed =
        static_cast<int>(std::min<int64_t>(request.number("streamed"), tile_layout(problem, plan).k_shared));
    const int64_t rows = plan.tile_rows * plan.row_tiles;
    plan.block_groups = static_cast<int>((problem.batch + rows - 1) / rows);
    plan.shared_bytes = tile_layout(problem, plan).bytes;
    if (plan.shared_bytes > facts.shared_bytes || plan.unit_groups * plan.k_splits > max_warps(problem.type))
      emulator::fault("the given plan does not fit the device");
    return plan;
  }
  return route < 0 ? make_plan(problem, facts) : make_plan(problem, facts, static_cast<Route>(route));
}

// With needs_autograd, activations are saved and the backward pass follows.
template <typename S>
void run(const Records& request, Problem problem, int64_t rows, bool needs_autograd, Outputs& out, Answer* answer) {
  const int64_t T = problem.steps, B = problem.batch, H = problem.hidden, P = problem.output;
  const bool lstm = problem.mode == Mode::kLstm, projected = P != H;
  const int D = problem.directions;
  const int64_t saved_width = saved_blocks(problem.mode, projected) * H;
  const RecurrenceShape shape = {
      problem.mode, T, B, H, P, D, request.data<const int64_t>("lengths"), request.data<const int64_t>("row_offsets")};
  const auto in = [&](const char* name, int d) { return request.data<const S>(name + std::to_string(d)); };
  // Both directions are adjacent, as in the op: the second is aligned to its elements only.
  const auto in_both = [&](const char* name, int d, int64_t each) {
    const S* both = request.data<const S>(name);
    return both ? both + d * each : nullptr;
  };
  const auto reverse = [&](int d) { return request.number("reverse", 0) != d; };

  RecurrenceForward<S> forward = {};
  forward.shape = shape;
  S* y = out.add<S>("y", rows * D * P);  // both directions share a row
  S* h_n = out.add<S>("h_n", D * B * P);
  S* c_n = lstm ? out.add<S>("c_n", D * B * H) : nullptr;
  S* saved = needs_autograd && saved_width ? out.add<S>("saved", D * rows * saved_width) : nullptr;
  for (int d = 0; d < D; ++d) {
    ForwardDirection<S>& f = forward.direction[d];
    f = {reverse(d), in("gates_x", d), in("w_hh", d), in("w_hr", d), in("b_hh", d)};
    f.h0 = in_both("h0", d, B * P);
    f.c0 = in_both("c0", d, B * H);
    f.y = y + d * P;
    f.y_stride = D * P;
    f.h_n = h_n + d * B * P;
    f.c_n = c_n ? c_n + d * B * H : nullptr;
    f.saved = saved ? saved + d * rows * saved_width : nullptr;
  }
  problem.pass = Pass::kForward;
  const Plan plan = plan_of(request, problem);
  {
    const Workspace workspace(problem, plan);
    forward.workspace = workspace.data();
    expect(recurrence_forward<S>(forward, plan, nullptr), "recurrence_forward");
  }
  if (answer) answer->number("route", static_cast<int64_t>(plan.route));
  if (answer) answer->number("group_blocks", plan.group_blocks);
  if (!needs_autograd) return;

  RecurrenceBackward<S> backward = {};
  backward.shape = shape;
  const bool initial = request.number("initial_gradients", 1) != 0;
  S* dh0 = initial ? out.add<S>("dh0", D * B * P) : nullptr;
  S* dc0 = initial && lstm ? out.add<S>("dc0", D * B * H) : nullptr;
  for (int d = 0; d < D; ++d) {
    const std::string suffix = std::to_string(d);
    const ForwardDirection<S>& f = forward.direction[d];
    BackwardDirection<S>& b = backward.direction[d];
    b = {f.reverse, in_both("grad_y", d, P), D * P};
    b.grad_h_n = in_both("grad_h_n", d, B * P);
    b.grad_c_n = in_both("grad_c_n", d, B * H);
    b.w_hh = f.w_hh;
    b.w_hr = f.w_hr;
    b.h0 = f.h0;
    b.c0 = f.c0;
    b.y = f.y;
    b.y_stride = f.y_stride;
    b.saved = f.saved;
    b.dz = out.add<S>("dz_" + suffix, rows * blocks_of(problem.mode) * H);
    b.dh = projected ? out.add<S>("dh_" + suffix, rows * P) : nullptr;
    b.dh0 = dh0 ? dh0 + d * B * P : nullptr;
    b.dc0 = dc0 ? dc0 + d * B * H : nullptr;
  }
  problem.pass = Pass::kBackward;
  const Plan backward_plan = plan_of(request, problem);
  {
    const Workspace workspace(problem, backward_plan);
    backward.workspace = workspace.data();
    expect(recurrence_backward<S>(backward, backward_plan, nullptr), "recurrence_backward");
  }
  if (answer) answer->number("backward_route", static_cast<int64_t>(backward_plan.route));
  if (answer) answer->number("backward_group_blocks", backward_plan.group_blocks);
}

template <typename S>
void run_all(const Records& request, const Problem& problem, Answer& answer) {
  const int64_t* offsets = request.data<const int64_t>("row_offsets");
  const int64_t rows = offsets ? offsets[problem.steps] : problem.steps * problem.batch;
  emulator::in_every_order(request, answer, {"saved"}, [&](Outputs& outputs, int64_t turn, int64_t turns) {
    // The last run is an inference: nothing is saved, results are the same. Saved activations are undefined beyond a
    // row's length.
    const bool needs_autograd = turn == 0 || turn + 1 < turns;
    run<S>(request, problem, rows, needs_autograd, outputs, turn == 0 ? &answer : nullptr);
  });
}

}  // namespace

int main(int, char** arguments) {
  const Records request(arguments[1]);
  Answer answer(arguments[2]);
  emulator::device = {static_cast<int>(request.number("sm", 90)), static_cast<int>(request.number("sm_count", 132)),
                      request.number("shared_bytes", 227 * 1024)};
  Problem problem = {};
  problem.mode = static_cast<Mode>(request.number("mode"));
  problem.type = static_cast<Type>(request.number("type"));
  problem.steps = request.number("steps");
  problem.batch = request.number("batch");
  problem.hidden = request.number("hidden");
  problem.output = request.number("output", problem.hidden);
  problem.directions = static_cast<int>(request.number("directions", 1));
  problem.allow_tf32 = request.number("allow_tf32") != 0;
  switch (problem.type) {
    case Type::kFloat32:
      run_all<float>(request, problem, answer);
      break;
    case Type::kFloat64:
      run_all<double>(request, problem, answer);
      break;
    case Type::kBFloat16:
      run_all<BFloat16>(request, problem, answer);
      break;
    case Type::kFloat16:
      run_all<Float16>(request, problem, answer);
      break;
  }
}
