// The GPU of a call: its facts, its current stream, and what is said when it refuses something.
#pragma once

#include <deque>
#include <mutex>
#include <optional>

#include "cuda/rnn/launchers.h"
#include "torch/tensor_args.h"

namespace llm_ext {

inline void check_queued(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, op, ": CUDA reports: ", cuda::error_text(error));
}

// cudaErrorLaunchOutOfResources, cudaErrorCooperativeLaunchTooLarge, cudaErrorInvalidClusterSize.
inline bool is_too_large(int error) { return error == 701 || error == 720 || error == 912; }

// Of a device, asked for once.
inline const cuda::DeviceFacts& facts_of(const char* op, int device) {
  static std::mutex mutex;
  static std::deque<std::optional<cuda::DeviceFacts>> known;  // does not move what it holds
  const std::lock_guard<std::mutex> lock(mutex);
  while (static_cast<int>(known.size()) <= device) known.emplace_back();
  std::optional<cuda::DeviceFacts>& facts = known[device];
  if (!facts.has_value()) {
    cuda::DeviceFacts found;
    check_queued(op, cuda::device_facts(device, &found));
    facts = found;
  }
  STD_TORCH_CHECK(facts->sm >= 80, op, ": cuda:", device, " has compute capability ", facts->sm / 10, ".",
                  facts->sm % 10, ", but 8.0 is the least that llm_ext has kernels for");
  return *facts;
}

// Makes a device current as long as it lives, and knows its current stream.
class OnDevice {
 public:
  OnDevice(const char* op, int32_t device) : guard_(device), facts(facts_of(op, device)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;

 public:
  const cuda::DeviceFacts& facts;
  void* stream = nullptr;
};

}  // namespace llm_ext
