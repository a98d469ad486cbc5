// The device of runtime.cpp.
#pragma once

#include <cstdint>

struct Fake {
  int device = 90;                // compute capability
  int code = 90;                  // that of the PTX from which the code was made
  bool no_image = false;          // no code for this device
  int shared_bytes = 227 * 1024;  // that a block may have
  int launch_error = 0;           // what a launch returns
  int launches = 0;               // so far
  int64_t blocks = 0;             // of the last launch, along x
};
extern Fake fake;

// Whether cudaGetLastError() would return an error.
bool has_error();
