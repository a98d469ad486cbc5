// stream_order.h on a real device.
#include "cuda/device.cuh"
#include "cuda/stream_order.h"

namespace llm_ext {
namespace cuda {

int new_event(void** event) { return create_event(event); }
int record_event(void* event, void* stream) { return queue_event(event, stream); }
int await_event(void* event, void* stream) { return queue_wait(event, stream); }
uint64_t capture_of(void* stream) { return captured_graph(stream); }

}  // namespace cuda
}  // namespace llm_ext
