// Runs the threads of a grid as fibers on one thread of the host, in an order drawn from a seed.
//
// A thread runs until it waits (at a barrier, in an exchange of its warp, for a flag or an mbarrier) or offers to be
// interrupted (where it has done something that others wait for); then another one runs. If none can, that is a
// deadlock, and is reported with the call site where each thread waits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "fibers.h"
#include "races.h"

namespace emulator {

// Threads that wait for each other.
struct Meeting {
  size_t expected = 0;
  CallSite site;  // of the first that came
  std::vector<Thread*> waiting;
};

// An exchange between the lanes of a warp. Lanes leave numbers in one of two sets of slots, in turn: one that hurries
// on to the next exchange must not overwrite what others have yet to read, and cannot get further than that.
struct Warp {
  Meeting meeting;
  int turn = 0;
  alignas(16) unsigned char slots[2][kWarp][kSlotBytes];
};

// A barrier in two halves.
struct SplitBarrier {
  size_t expected = 0;
  uint64_t phase = 0;
  std::vector<Arrival> arrivals;
  Known known[2];  // of this phase and the one before, by its last bit
  std::vector<Thread*> waiting;
};

// Counts bytes that arrive, phase by phase.
struct Mbarrier {
  bool published = true;  // other blocks see that it is initialized
  uint64_t phase = 0;     // number of phases that have ended
  bool expected = false;  // whether the expected bytes of this phase are set
  int64_t pending = 0;    // bytes expected minus bytes arrived; negative while expected bytes are not set
  std::vector<Arrival> arrivals;
  Arrival own;        // that of the thread which set the expected bytes of this phase
  Known known[2];     // of this phase and the one before, by the last bit
  Known in_block[2];  // the part of it that threads of the own block told
  std::vector<Thread*> waiting;
};

// An asynchronous DSMEM store on its way to another block.
struct DsmemStore {
  unsigned char words[16];
  unsigned char* to;
  Block* block;  // the block of `to`
  Mbarrier* mbarrier;
  Arrival sender;
  const void* line;
};

struct Cluster;

struct Block {
  Cluster* cluster = nullptr;
  unsigned x = 0, y = 0, z = 0;
  size_t number = 0;                // within the grid
  size_t live = 0;                  // threads that have not ended
  unsigned char* shared = nullptr;  // exactly shared_bytes, with ASan's red zones around; gone when all threads ended
  Meeting barrier;
  std::map<size_t, Mbarrier> mbarriers;  // by offset in shared memory
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Thread>> threads;
};

struct Cluster {
  size_t live = 0;  // blocks that have not ended
  SplitBarrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

// An asynchronous copy that has not landed.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  const void* line;
};

struct Stack;

struct Thread {
  Block* block = nullptr;
  Position position;
  Stack* stack = nullptr;
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;  // ASan's
  uint64_t priority = 0;
  CallSite site;
  bool arrived = false;              // at the barrier of the cluster, and has not waited
  uint64_t phase = 0;                // in which it arrived
  const uint32_t* polled = nullptr;  // the flag polled last, and its value then
  uint32_t polled_value = 0;
  bool polling = false;   // waits in poll_flag()
  bool spinning = false;  // went on without a change, and has done nothing since but poll
  Knowledge knowledge;
  std::vector<Copy> copies;

  unsigned lane() const { return position.index % kWarp; }
  Warp& warp() const { return block->warps[position.index / kWarp]; }
};

// The seed of all that is left to chance from here on.
void seed(uint64_t value);

// Runs a grid to its end.
void run(const Launch& launch);

// The thread that runs.
Thread& self();
bool running();

// An exchange in which the last to come calls `last` before anyone goes on.
Slots exchange(const void* given, size_t bytes, CallSite site, const std::function<void(Slots)>& last);

// Ends the program, saying why.
[[noreturn]] void fault(const std::string& why, CallSite site = {});

// Exit status of a program that found a fault.
constexpr int kFault = 3;

}  // namespace emulator
