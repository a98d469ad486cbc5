#include "cuda/plan.h"

#include "cuda/generic.h"

namespace llm_ext {
namespace cuda {

Plan make_plan(const Problem&, const DeviceFacts&) { return Plan{}; }

Plan make_plan(const Problem&, const DeviceFacts&, Route) { return Plan{}; }

int64_t workspace_bytes(const Problem& problem, const Plan&) {
  const int64_t blocks = (problem.batch + kGenericRows - 1) / kGenericRows * problem.directions;
  const int64_t numbers = problem.pass == Pass::kForward
                              ? generic_forward_scratch(problem.hidden, problem.output)
                              : generic_backward_scratch(gates_of(problem.cell), problem.hidden, problem.output);
  return blocks * numbers * (problem.type == Type::kFloat64 ? 8 : 4);
}

}  // namespace cuda
}  // namespace llm_ext
