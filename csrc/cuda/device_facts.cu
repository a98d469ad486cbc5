// device_facts.h on a real device.
#include "cuda/device.cuh"
#include "cuda/device_facts.h"
#include "cuda/rnn/tiles.h"

namespace llm_ext {
namespace cuda {

int device_facts(int device, DeviceFacts* facts) {
  const int error = query_device(device, facts);
  for (int i = 0; error == 0 && facts->sm >= 90 && i < kClusterSizes; ++i) {
    facts->resident_clusters[i] = resident_tile_clusters(1 << i, facts->shared_bytes);
  }
  return error;
}

const char* error_text(int error) { return error_text_of(error); }

}  // namespace cuda
}  // namespace llm_ext
