// Properties of a GPU that the plans depend on. Plain C++: no CUDA header is needed.
#pragma once

#include <cstdint>

namespace llm_ext {
namespace cuda {

constexpr int kWarpThreads = 32;
constexpr int kClusterSizes = 5;  // clusters of 1, 2, 4, 8 and 16 blocks

struct DeviceFacts {
  int sm = 0;                                 // compute capability, 10 major + minor
  int sm_count = 0;                           // multiprocessors
  int64_t shared_bytes = 0;                   // the most shared memory that a block may request
  int resident_clusters[kClusterSizes] = {};  // clusters of 2^i such blocks that run at the same time; 0: none
};

// Fills *facts; the device must be current. Returns a cudaError_t. Slow: call it once per device.
int device_facts(int device, DeviceFacts* facts);

// The message of a cudaError_t that a launcher returned.
const char* error_text(int error);

}  // namespace cuda
}  // namespace llm_ext
