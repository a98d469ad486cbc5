// Functions of the CUDA runtime without a GPU, for a program that is linked without the runtime: they answer as the
// device of `fake` does, and note the launches.
#include <cuda_runtime.h>

#include <cstring>

#include "fake.h"

Fake fake;

namespace {

cudaError_t last_error = cudaSuccess;
cudaError_t answer(cudaError_t error) { return last_error = error; }

}  // namespace

bool has_error() { return last_error != cudaSuccess; }

extern "C" {
// The functions that nvcc's code calls before main().
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*) {}
char __cudaInitModule(void**) { return 0; }
cudaError_t __cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return answer(cudaErrorUnknown);
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, struct CUstream_st*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaSuccess; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? fake.shared_bytes : 0;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  if (fake.no_image) return answer(cudaErrorNoKernelImageForDevice);
  std::memset(attributes, 0, sizeof *attributes);
  attributes->binaryVersion = fake.device;
  attributes->ptxVersion = fake.code;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t* config) {
  *count = static_cast<int>(132 / config->gridDim.x);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  ++fake.launches;
  fake.blocks = config->gridDim.x;
  return answer(static_cast<cudaError_t>(fake.launch_error));
}
}
