// The scheduler's interface for kernels: the launch, the position of a thread, and the calls that can wait. Every
// kernel is compiled with this header, so it includes no header of the standard library that takes long.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

// The call, file and line where a thread waits.
struct CallSite {
  const char* what = "";
  const char* file = "";
  int line = 0;
};

struct Launch {
  int64_t grid_x = 1, grid_y = 1, grid_z = 1;
  unsigned threads = 1;                     // a block
  unsigned cluster = 1;                     // blocks a cluster, along x
  size_t shared_bytes = 0;                  // a block
  bool all_resident = false;                // all blocks run at the same time
  const void* function = nullptr;           // for its name
  void (*run)(const void* call) = nullptr;  // on every thread
  const void* call = nullptr;

  size_t blocks() const { return static_cast<size_t>(grid_x * grid_y * grid_z); }
};

// The position of a thread.
struct Position {
  unsigned index = 0;  // within the block
  unsigned block_x = 0, block_y = 0, block_z = 0;
  unsigned char* shared = nullptr;  // shared memory of the block
};

// Ends the program, saying why.
[[noreturn]] void fault(const char* why, CallSite site);

// The running launch, and the position of the running thread.
const Launch& launch();
const Position& position();

// The barrier of the block: waits for the other threads, and knows what they did before.
void block_barrier(CallSite site);
// The barrier of the cluster. A thread that has waited knows what the others did before they arrived, unless an arrival
// does not release.
void cluster_arrive(CallSite site, bool releases = true);
void cluster_wait(CallSite site);

constexpr unsigned kWarp = 32;
constexpr size_t kSlotBytes = 64;

// The slots of the warp: `[lane]` is the value of that lane, valid until the next exchange. Says nothing about memory.
using Slots = unsigned char (*)[kSlotBytes];
Slots exchange(const void* given, size_t bytes, CallSite site);

void raise_flag(uint32_t* flag, uint32_t value, bool releases = true);
void await_flag(const uint32_t* flag, uint32_t value, CallSite site);
// The value of a flag. A thread that finds the same value again waits until the flag is raised, or nobody else can run.
uint32_t poll_flag(const uint32_t* flag, bool acquires, CallSite site);

// Mbarriers in shared memory; bytes arrive some time after the store. Other blocks may store once an mbarrier is
// published, that is, its initialization fenced. A wait in the scope of the block orders nothing of other blocks.
void init_mbarrier(void* mbarrier, CallSite site, bool published = true);
void publish_mbarriers();
void expect_bytes(void* mbarrier, int bytes, CallSite site);
void wait_mbarrier(void* mbarrier, int parity, CallSite site, bool in_cluster = true);
void store_dsmem_async(void* to, const void* words, void* mbarrier, int rank, CallSite site);

// A copy to shared memory, which arrives when it is waited for. Until then ASan poisons its destination.
void copy_async(void* to, const void* from, size_t bytes, CallSite site);
void copy_async_wait();

}  // namespace emulator
