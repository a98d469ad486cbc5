// Calls the launches of csrc/cuda/device.cuh over the functions of runtime.cpp. Prints the checks that fail.
#include <cstdio>

#include "cuda/device.cuh"
#include "fake.h"

using namespace llm_ext::cuda;

struct Nothing {
  int64_t numbers[4];
};
LLM_EXT_KERNEL(32) void nothing(LLM_EXT_PARAMS Nothing) {}

int failed = 0;
#define EXPECT(condition) \
  if (!(condition)) failed = std::printf("%d: %s\n", __LINE__, #condition)

int main() {
  LaunchShape shape;
  shape.threads = 32;
  shape.cluster = 4;
  EXPECT(resident_clusters(&nothing, shape) == 33);
  // Code for 8.0 that the driver has compiled for 9.0: its cluster functions trap.
  for (const int code : {80, 86, 89}) {
    fake.code = code;
    EXPECT(resident_clusters(&nothing, shape) == 0);
  }
  fake.no_image = true;
  EXPECT(resident_clusters(&nothing, shape) == 0 && !has_error());
  fake = {};

  shape.cluster = 1;
  EXPECT(launch(&nothing, shape, Nothing{}, nullptr) == 0 && fake.launches == 1 && fake.blocks == 1);
  shape.grid_x = INT32_MAX;
  EXPECT(launch(&nothing, shape, Nothing{}, nullptr) == 0 && fake.blocks == INT32_MAX);
  // As an unsigned number, the last of them would be one block.
  for (const int64_t blocks : {int64_t{0}, int64_t{-1}, int64_t{INT32_MAX} + 1, (int64_t{1} << 32) + 1}) {
    shape.grid_x = blocks;
    EXPECT(launch(&nothing, shape, Nothing{}, nullptr) == cudaErrorInvalidConfiguration && fake.launches == 2);
  }
  shape.grid_x = 1;
  shape.grid_y = 65536;
  EXPECT(launch(&nothing, shape, Nothing{}, nullptr) == cudaErrorInvalidConfiguration);
  shape.grid_y = 1;
  fake.launch_error = cudaErrorCooperativeLaunchTooLarge;
  EXPECT(launch(&nothing, shape, Nothing{}, nullptr) == cudaErrorCooperativeLaunchTooLarge && !has_error());
  return failed != 0;
}
