// GridTurns of csrc/torch/ops over streams and events of its own: prints what is queued.
#include "torch/ops/grid_turns.h"

#include <cstdio>
#include <cstdlib>

namespace {

int events = 0;
uint64_t capture = 0;
int stream_of(void* stream) { return static_cast<int>(reinterpret_cast<intptr_t>(stream)); }
int event_of(void* event) { return static_cast<int>(reinterpret_cast<intptr_t>(event)); }

}  // namespace

namespace llm_ext {
namespace cuda {

int new_event(void** event) {
  *event = reinterpret_cast<void*>(static_cast<intptr_t>(++events));
  return 0;
}
int record_event(void* event, void* stream) {
  std::printf("stream %d records event %d\n", stream_of(stream), event_of(event));
  return 0;
}
int await_event(void* event, void* stream) {
  std::printf("stream %d awaits event %d\n", stream_of(stream), event_of(event));
  return 0;
}
uint64_t capture_of(void*) { return capture; }

}  // namespace cuda
}  // namespace llm_ext

// Arguments: a stream, a capture (0: none) and an error of the launch, for each grid.
int main(int count, char** arguments) {
  llm_ext::GridTurns turns;
  for (int i = 1; i + 2 < count; i += 3) {
    const intptr_t stream = std::atoi(arguments[i]);
    capture = static_cast<uint64_t>(std::atoi(arguments[i + 1]));
    const int error = std::atoi(arguments[i + 2]);
    const int found = turns.run(reinterpret_cast<void*>(stream), [&] {
      std::printf("stream %d runs a grid\n", static_cast<int>(stream));
      return error;
    });
    if (found != error) return 1;
  }
  return 0;
}
