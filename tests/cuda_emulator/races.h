// Finds two accesses to the same memory of which one is a write and nothing says which comes first.
//
// Every load and store of a kernel to memory of the device or to shared memory comes here, from the calls that
// AddressSanitizer has put before it. What a thread knows of another is the last of that one's times that lies before
// its own present (a vector clock): barriers, and flags released and acquired, hand knowledge on. So a barrier that is
// missing is found in whatever order the threads happen to run, even where the result is right.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace emulator {

struct Block;
struct Thread;

// For each block of the grid, and each of its threads, the last of its times that is known; null where none is. Never
// changed once it is shared, so that what many know the same is there once.
using Times = std::shared_ptr<const std::vector<uint32_t>>;
using Known = std::shared_ptr<const std::vector<Times>>;

// Of a thread that has arrived at a barrier: what it knew, and its time.
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

// Memory to be watched. What lay there before is forgotten. Shared memory has a block, which others may touch only
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

// What all who have arrived together know.
Arrival arrive(Knowledge& thread);
Known meet(const std::vector<Arrival>& arrivals);
void learn(Knowledge& thread, const Known& known);

// What the thread knows is found by those that acquire the same address later.
void release(Knowledge& thread, const void* address);
void acquire(Knowledge& thread, const void* address);

}  // namespace races
}  // namespace emulator
