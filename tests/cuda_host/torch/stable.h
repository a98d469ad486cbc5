// Stands before csrc/torch/stable.h where csrc/torch/*_cuda.cpp are compiled for the CPU, as the emulator's device.cuh
// stands before that of csrc/cuda: what it asks of a GPU's torch is asked of the CPU's.
#pragma once

#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstring>

// Memory is pinned for a GPU only.
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
namespace torch::stable::accelerator {
using ::NoDeviceGuard;
}
#define DeviceGuard NoDeviceGuard

inline AOTITorchError no_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}
#define aoti_torch_get_current_cuda_stream no_stream
#define aoti_torch_cuda_mm_out aoti_torch_cpu_mm_out
#define aoti_torch_cuda_addmm_out aoti_torch_cpu_addmm_out
// The device of an x on the CPU, by number.
#define get_device_index() is_cpu() * 0
#define is_cuda is_cpu
#define CUDA CPU
