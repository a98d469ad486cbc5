// The race detector: finds two accesses to the same memory, one of them a write, that no synchronization orders.
//
// Every load and store of a kernel to global or shared memory comes here, from the calls that AddressSanitizer inserts.
// A vector clock per thread holds the last time of each other thread that happens before its own present; barriers, and
// flags that are released and acquired, pass it on. So a missing barrier is found in every order of the threads, even
// if the result is right.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace emulator {

struct Block;
struct Thread;

// The vector clock of a thread: for each block of the grid and each of its threads the last known time; null if none is
// known. It is immutable once shared, so that threads with equal knowledge share one copy.
using Times = std::shared_ptr<const std::vector<uint32_t>>;
using Known = std::shared_ptr<const std::vector<Times>>;

// The clock of a thread that has arrived at a barrier, and its time.
struct Arrival {
  uint32_t number;
  uint32_t time;
  Known known;
};

struct Knowledge {
  uint32_t number = 0;  // of the thread in its grid
  uint32_t time = 1;    // the own time goes on whenever others may learn of it
  Known known;
};

namespace races {

// Watches memory, and forgets earlier accesses. Shared memory belongs to a block, which others may access only
// once they know that it has started, and before it ends.
void watch(const void* start, size_t bytes, const Block* block = nullptr);
void forget(const void* start);

// On unless it is turned off.
void watching(bool on);

// A launch comes after all that was before. Its threads know nothing of each other.
void begin(size_t blocks, size_t threads_of_block);
void begin(Knowledge& thread, size_t block, size_t index);

// Atomic accesses do not race with each other. `line` is an address in the code.
void access(const void* address, size_t bytes, bool writes, bool atomic, const void* line);
// A write on behalf of a thread, that knew and knows no more than when it asked for it.
void write_for(const Arrival& asker, const void* address, size_t bytes, const void* line);

// The joint knowledge of the threads that have arrived.
Arrival arrive(Knowledge& thread, bool releases = true);
Known meet(const std::vector<Arrival>& arrivals);
void learn(Knowledge& thread, const Known& known);

// Publishes the thread's knowledge to threads that acquire the same address later.
void release(Knowledge& thread, const void* address);
void acquire(Knowledge& thread, const void* address);

}  // namespace races
}  // namespace emulator
