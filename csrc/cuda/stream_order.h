// Order between streams. Plain C++: no CUDA header is needed.
#pragma once

#include <cstdint>

namespace llm_ext {
namespace cuda {

// Creates an event of the current device. These functions return a cudaError_t and clear CUDA's last error.
int new_event(void** event);
// The event stands for all work that the stream has now.
int record_event(void* event, void* stream);
// Work that is queued on the stream from now on waits for the event.
int await_event(void* event, void* stream);

// The number of the CUDA graph that is being captured from the stream; 0: none is.
uint64_t capture_of(void* stream);

}  // namespace cuda
}  // namespace llm_ext
