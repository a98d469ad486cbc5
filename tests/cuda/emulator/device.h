// The implementation of cuda/device.cuh besides the scheduler: the emulated device, its arithmetic and its matrix
// instructions.
#pragma once

#include <cstdint>

#include "fibers.h"

#ifndef LLM_EXT_CODE
#define LLM_EXT_CODE 90
#endif

namespace emulator {

// The properties of the emulated device.
struct Device {
  int sm = 90;
  int sm_count = 132;
  int64_t shared_bytes = 227 * 1024;  // the most that a block may ask for
  int code = LLM_EXT_CODE;            // what the kernels were compiled for; less than sm: PTX of an older generation
};
extern Device device;

// Runs the launch, or returns the cudaError_t of a device that refuses it.
int run_on_device(const Launch& launch);

uint32_t bits_of(float x);
float float_of(uint32_t bits);
float float_of_bfloat16(uint16_t bits);
float float_of_float16(uint16_t bits);
// Rounded to nearest, ties to even.
uint16_t bfloat16_of(float x);
uint16_t float16_of(float x);
// Rounded to nearest, ties away from zero.
float tf32_of(float x);

// With errors as large as the device may make; the same x always has the same error.
float exp_approximately(float x);
float quotient_approximately(float a, float b);

// mma.sync of PTX, all lanes of the warp together: registers lie in the lanes as PTX says. Products are exact, sums
// are float.
void mma_m16n8k16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*widen)(uint16_t),
                  CallSite site);
void mma_m16n8k8_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CallSite site);

}  // namespace emulator
