// Replaces csrc/torch/stable.h when csrc/torch/ops/*_cuda.cpp are compiled for the CPU, as the emulator's device.cuh
// replaces that of csrc/cuda: functions of torch's CUDA half become those of its CPU half.
#pragma once

#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstring>

// Pinned memory needs a GPU.
inline AOTITorchError call_unpinned(const char* op, const char* overload, StableIValue* stack, uint64_t version) {
  if (std::strcmp(op, "aten::empty") == 0) stack[4] = 0;
  return torch_call_dispatcher(op, overload, stack, version);
}
#define torch_call_dispatcher call_unpinned

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

struct NoDeviceGuard {
  explicit NoDeviceGuard(int) {}
};
inline int zero_device_index() { return 0; }
namespace torch::stable::accelerator {
using ::NoDeviceGuard;
using ::zero_device_index;
}  // namespace torch::stable::accelerator
#define DeviceGuard NoDeviceGuard
#define getCurrentDeviceIndex zero_device_index

inline AOTITorchError no_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}
#define aoti_torch_get_current_cuda_stream no_stream
#define aoti_torch_cuda_mm_out aoti_torch_cpu_mm_out
#define aoti_torch_cuda_addmm_out aoti_torch_cpu_addmm_out
// A CPU tensor passes for one on cuda:0.
#define get_device_index() is_cpu() * 0
#define is_cuda is_cpu
#define CUDA CPU
