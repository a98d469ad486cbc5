// The GPU of a call: its properties, its current stream, and the errors of launches.
#pragma once

#include <deque>
#include <mutex>
#include <optional>

#include "cuda/device_facts.h"
#include "torch/ops/grid_turns.h"
#include "torch/stable.h"

namespace llm_ext {

// Throws if a launcher returned an error.
inline void check_queued(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, op, ": CUDA reports: ", cuda::error_text(error));
}

// Whether a launch failed with cudaErrorLaunchOutOfResources, cudaErrorCooperativeLaunchTooLarge,
// cudaErrorNotSupported (no cooperative launch) or cudaErrorInvalidClusterSize: a process may have less of the device
// than device_facts() reports (MPS, green contexts, virtual GPUs), and a simpler plan may run.
inline bool asks_too_much(int error) { return error == 701 || error == 720 || error == 801 || error == 912; }

// The properties of a device, which must be current. They are queried once per device.
inline const cuda::DeviceFacts& facts_of(const char* op, int device) {
  static std::mutex mutex;
  static std::deque<std::optional<cuda::DeviceFacts>> known;  // a deque: references stay valid
  const std::lock_guard<std::mutex> lock(mutex);
  while (static_cast<int>(known.size()) <= device) known.emplace_back();
  std::optional<cuda::DeviceFacts>& facts = known[device];
  if (!facts.has_value()) {
    cuda::DeviceFacts found;
    check_queued(op, cuda::device_facts(device, &found));
    facts = found;
  }
  STD_TORCH_CHECK(facts->sm >= 80, op, ": cuda:", device, " has compute capability ", facts->sm / 10, ".",
                  facts->sm % 10, ", but llm_ext needs at least 8.0");
  return *facts;
}

// Makes a device current for its lifetime. Ops create it after all checks of their arguments.
class CudaDevice {
 public:
  CudaDevice(const char* op, int32_t device) : index_(device) {
    if (torch::stable::accelerator::getCurrentDeviceIndex() != device) guard_.emplace(device);
    facts_ = &facts_of(op, device);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_));
  }

  const cuda::DeviceFacts& facts() const { return *facts_; }
  void* stream() const { return stream_; }

  // Calls run(), which queues kernels and returns an error; if the blocks of one wait for each other, in its turn.
  template <typename Run>
  int launch(bool blocks_wait, const Run& run) const {
    return blocks_wait ? turns_of(index_).run(stream_, run) : run();
  }

 private:
  static GridTurns& turns_of(int device) {
    static std::mutex mutex;
    static std::deque<GridTurns> known;  // a deque: references stay valid
    const std::lock_guard<std::mutex> lock(mutex);
    while (static_cast<int>(known.size()) <= device) known.emplace_back();
    return known[device];
  }

  const int32_t index_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  const cuda::DeviceFacts* facts_ = nullptr;
  void* stream_ = nullptr;
};

}  // namespace llm_ext
