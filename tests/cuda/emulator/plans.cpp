// Plans for the problems of a request, and the memory they need.
#include "cuda/device_facts.h"
#include "cuda/rnn/launchers.h"
#include "device.h"
#include "records.h"

int main(int, char** arguments) {
  using namespace llm_ext;
  using namespace llm_ext::cuda;
  const emulator::Records request(arguments[1]);
  emulator::Answer answer(arguments[2]);
  emulator::device = {static_cast<int>(request.number("sm")), static_cast<int>(request.number("sm_count")),
                      request.number("shared_bytes"), static_cast<int>(request.number("code", LLM_EXT_CODE))};
  DeviceFacts facts;
  if (device_facts(0, &facts)) return 1;
  // Rows of mode, pass, type, steps, batch, hidden, output, directions, allow_tf32, and a route or -1.
  constexpr int kColumns = 10;
  const int64_t* row = request.data<const int64_t>("problems");
  const int64_t count = static_cast<int64_t>(request.bytes("problems") / sizeof(int64_t)) / kColumns;
  for (int64_t i = 0; i < count; ++i, row += kColumns) {
    const Problem problem = {static_cast<Mode>(row[0]),
                             static_cast<Pass>(row[1]),
                             static_cast<Type>(row[2]),
                             row[3],
                             row[4],
                             row[5],
                             row[6],
                             static_cast<int>(row[7]),
                             row[8] != 0};
    const Plan plan = row[9] < 0 ? make_plan(problem, facts) : make_plan(problem, facts, static_cast<Route>(row[9]));
    const int64_t numbers[] = {static_cast<int64_t>(plan.route),
                               plan.tf32,
                               plan.group_blocks,
                               plan.unit_groups,
                               plan.k_splits,
                               plan.tile_rows,
                               plan.row_tiles,
                               plan.block_groups,
                               plan.shared_bytes,
                               workspace_bytes(problem, plan)};
    answer.add(std::to_string(i), numbers, sizeof numbers);
  }
}
