// Grids whose blocks wait for each other take turns on a device.
#pragma once

#include <cstdint>
#include <mutex>

#include "cuda/stream_order.h"

namespace llm_ext {

// Two such grids, of two streams, could each hold a part of a GPU and wait for the rest forever: a cooperative launch
// fails if its blocks do not fit on the empty device, but CUDA does not say that two of them never start together. So
// each waits for the one before it, by events, without the host. In a CUDA graph those of one graph are in turn; a
// graph is not in turn with other graphs, nor with calls outside of it.
class GridTurns {
 public:
  // Calls launch(), which queues a grid on the stream and returns an error, in its turn. The device must be current.
  template <typename Launch>
  int run(void* stream, const Launch& launch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t capture = cuda::capture_of(stream);
    Last& last = last_[capture != 0];
    int error = 0;
    if (last.event == nullptr) {
      error = cuda::new_event(&last.event);
    } else if (last.capture == capture) {
      error = cuda::await_event(last.event, stream);
    }
    if (error == 0) error = launch();
    if (error != 0) return error;
    last.capture = capture;
    return cuda::record_event(last.event, stream);
  }

 private:
  // An event of a capture means nothing outside of it: calls outside have one of their own.
  struct Last {
    void* event = nullptr;
    uint64_t capture = 0;
  };
  std::mutex mutex_;
  Last last_[2];
};

}  // namespace llm_ext
