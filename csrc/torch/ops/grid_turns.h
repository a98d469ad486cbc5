// Grids whose blocks wait for each other take turns on a device.
#pragma once

#include <cstdint>
#include <mutex>

#include "cuda/stream_order.h"

namespace llm_ext {

// Two such grids, of two streams, could each hold a part of a GPU and wait for the rest forever: a cooperative launch
// fails if its blocks do not fit on the empty device, but CUDA does not say that two of them never start together. So
// each waits for the one before it, by events, without the host. In a CUDA graph those of one graph are in turn; a
// graph is not in turn with other graphs, nor with calls outside of it. While more than 8 graphs are captured at the
// same time, the order within the oldest may be lost.
class GridTurns {
 public:
  // Calls launch(), which queues a grid on the stream and returns an error, in its turn. The device must be current.
  template <typename Launch>
  int run(void* stream, const Launch& launch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t capture = cuda::capture_of(stream);
    Last& last = last_of(capture);
    int error = 0;
    if (last.event == nullptr) {
      error = cuda::new_event(&last.event);
    } else if (last.recorded) {
      error = cuda::await_event(last.event, stream);
    }
    if (error == 0) error = launch();
    if (error != 0) return error;
    last.recorded = true;
    return cuda::record_event(last.event, stream);
  }

 private:
  // The last grid outside of captures, or of a capture: an event of a capture means nothing outside of it.
  struct Last {
    void* event = nullptr;
    uint64_t capture = 0;
    uint64_t used = 0;  // turn of the last grid
    bool recorded = false;
  };

  Last& last_of(uint64_t capture) {
    if (capture == 0) return outside_;
    Last* found = captured_;
    for (Last& last : captured_) {
      if (last.capture == capture) {
        found = &last;
        break;
      }
      if (last.used < found->used) found = &last;
    }
    if (found->capture != capture) {
      found->capture = capture;
      found->recorded = false;
    }
    found->used = ++turn_;
    return *found;
  }

  // A capture keeps its order until as many others have queued a grid since its last one.
  static constexpr int kCaptures = 8;
  std::mutex mutex_;
  Last outside_;
  Last captured_[kCaptures];
  uint64_t turn_ = 0;
};

}  // namespace llm_ext
