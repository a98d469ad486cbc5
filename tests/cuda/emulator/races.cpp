// Compiled without ASan's instrumentation: this is where that leads.
#include "races.h"

#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <map>
#include <string>
#include <unordered_map>

#include "scheduler.h"

namespace emulator::races {
namespace {

constexpr uint32_t kNobody = ~0u;
constexpr size_t kGranule = 2;  // bytes: the smallest numbers that different threads write side by side

struct Access {
  uint32_t thread = kNobody;
  uint32_t time = 0;
  bool atomic = false;
  const void* line = nullptr;
};

// The last accesses to a granule. Of reads that are not ordered among themselves two are remembered.
struct Shadow {
  uint32_t launch = 0;
  Access write;
  Access reads[2];
};

struct Region {
  const unsigned char* start;
  size_t bytes;
  const Block* block;
  std::vector<Shadow> cells;
};

bool on = true;
std::map<const void*, Region> regions;  // by their start
uint32_t launch_number = 0;
uint32_t index_bits = 0;  // of a thread's number; above them is that of its block
size_t block_threads = 0;
Known nothing;
std::unordered_map<const void*, Known> flags;

// The region in which a page was accessed last; null for a page without regions, such as those of stacks.
struct Page {
  uintptr_t number = 0;
  Region* region = nullptr;
};
constexpr uintptr_t kPage = 4096;
Page pages[256];

void forget_pages() { std::fill(std::begin(pages), std::end(pages), Page{}); }

bool contains(const Region& region, const unsigned char* p) {
  return p >= region.start && p < region.start + region.bytes;
}

Region* region_of(const void* address) {
  const auto* p = static_cast<const unsigned char*>(address);
  const uintptr_t number = reinterpret_cast<uintptr_t>(p) / kPage;
  Page& page = pages[number % std::size(pages)];
  if (page.number == number && (!page.region || contains(*page.region, p))) return page.region;
  const auto next = regions.upper_bound(address);
  Region* before = next == regions.begin() ? nullptr : &std::prev(next)->second;
  if (before && contains(*before, p)) {
    page = {number, before};
    return before;
  }
  const auto number_of = [](const unsigned char* at) { return reinterpret_cast<uintptr_t>(at) / kPage; };
  if ((!before || number_of(before->start + before->bytes) < number) &&
      (next == regions.end() || number_of(next->second.start) > number))
    page = {number, nullptr};
  return nullptr;
}

// As a site in a module, which program.py turns into lines. It is where the call before the access returns to.
std::string line_of(const void* pc) {
  char text[1024] = "";
  __sanitizer_symbolize_pc(static_cast<char*>(const_cast<void*>(pc)) - 1, "(%m+%o)", text, sizeof text);
  return text;
}

uint32_t block_of(uint32_t thread) { return thread >> index_bits; }
uint32_t index_of(uint32_t thread) { return thread & ((1u << index_bits) - 1); }

uint32_t time_of(const std::vector<Times>& known, uint32_t thread) {
  const Times& times = known[block_of(thread)];
  return times ? (*times)[index_of(thread)] : 0;
}

std::string name_of(uint32_t thread) {
  return "block " + std::to_string(block_of(thread)) + " thread " + std::to_string(index_of(thread));
}

[[noreturn]] void race(const Access& before, bool before_writes, const Access& now, bool now_writes) {
  fault(std::string("race: ") + (now_writes ? "write" : "read") + " at " + line_of(now.line) + " and " +
        (before_writes ? "write" : "read") + " at " + line_of(before.line) + " by " + name_of(before.thread) +
        ", and no barrier or flag orders them");
}

// All that either knows; one of the two if that knows what the other does.
Times joined(const Times& a, const Times& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  // Words instead of bools, so that the compiler uses vectors.
  uint32_t a_lacks = 0, b_lacks = 0;
  const uint32_t *of_a = a->data(), *of_b = b->data();
  for (size_t i = 0, n = a->size(); i < n; ++i) {
    a_lacks |= of_a[i] < of_b[i];
    b_lacks |= of_b[i] < of_a[i];
  }
  if (!a_lacks) return a;
  if (!b_lacks) return b;
  auto both = std::make_shared<std::vector<uint32_t>>(*a);
  for (size_t i = 0; i < both->size(); ++i) (*both)[i] = std::max((*both)[i], (*b)[i]);
  return both;
}

Known joined(const Known& a, const Known& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  // Many threads join the same two, one after the other.
  static Known recent_a, recent_b, recent_both;
  if (a == recent_a && b == recent_b) return recent_both;
  auto both = std::make_shared<std::vector<Times>>(*a);
  bool a_has_all = true;
  for (size_t i = 0; i < both->size(); ++i) {
    (*both)[i] = joined((*a)[i], (*b)[i]);
    a_has_all &= (*both)[i] == (*a)[i];
  }
  recent_a = a;
  recent_b = b;
  return recent_both = a_has_all ? a : both;
}

// Nobody else touches shared memory that may be gone.
void check_end(const Region& region, const Block& block) {
  Known known;
  for (const auto& thread : block.threads) known = joined(known, thread->knowledge.known);
  const auto check = [&](const Access& access) {
    if (access.thread == kNobody || block_of(access.thread) == block.number) return;
    if (time_of(*known, access.thread) < access.time)
      fault("block " + std::to_string(block.number) + " may have ended when its shared memory is touched at " +
            line_of(access.line) + " by " + name_of(access.thread));
  };
  for (const Shadow& cell : region.cells) {
    check(cell.write);
    check(cell.reads[0]);
    check(cell.reads[1]);
  }
}

}  // namespace

void watch(const void* start, size_t bytes, const Block* block) {
  regions[start] = {static_cast<const unsigned char*>(start), bytes, block,
                    std::vector<Shadow>((bytes + kGranule - 1) / kGranule)};
  forget_pages();
}

void forget(const void* start) {
  const auto region = regions.find(start);
  if (on && region->second.block) check_end(region->second, *region->second.block);
  // The address may come back as another's.
  for (auto flag = flags.begin(); flag != flags.end();) {
    const auto offset = static_cast<const unsigned char*>(flag->first) - region->second.start;
    flag = offset >= 0 && static_cast<size_t>(offset) < region->second.bytes ? flags.erase(flag) : std::next(flag);
  }
  regions.erase(region);
  forget_pages();
}

void watching(bool wanted) { on = wanted; }

void begin(size_t blocks, size_t threads_of_block) {
  ++launch_number;
  flags.clear();
  block_threads = threads_of_block;
  for (index_bits = 0; (size_t{1} << index_bits) < threads_of_block;) ++index_bits;
  nothing = std::make_shared<const std::vector<Times>>(blocks);
}

void begin(Knowledge& thread, size_t block, size_t index) {
  thread.number = static_cast<uint32_t>(block << index_bits | index);
  thread.known = nothing;
}

namespace {

void check(Region& region, const Access& now, const std::vector<Times>& known, const void* address, size_t bytes,
           bool writes) {
  const auto before = [&](const Access& a) {
    return a.thread == kNobody || a.thread == now.thread || time_of(known, a.thread) >= a.time ||
           (a.atomic && now.atomic);
  };
  if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fault("an access of " + std::to_string(bytes) + " bytes at " + line_of(now.line) + " is not aligned to as many");
  if (region.block && region.block->number != block_of(now.thread) && !known[region.block->number])
    fault("block " + std::to_string(region.block->number) +
          " may not have started when its shared memory is touched at " + line_of(now.line));
  const size_t first = static_cast<size_t>(static_cast<const unsigned char*>(address) - region.start);
  const size_t last = std::min(first + bytes, region.bytes);
  for (size_t i = first / kGranule; i * kGranule < last; ++i) {
    Shadow& cell = region.cells[i];
    if (cell.launch != launch_number) {
      cell = {};
      cell.launch = launch_number;
    }
    if (!before(cell.write)) race(cell.write, true, now, writes);
    if (writes) {
      for (Access& read : cell.reads) {
        if (!before(read)) race(read, false, now, true);
        read = {};
      }
      cell.write = now;
    } else {
      Access& mine = cell.reads[0];
      if (mine.thread != kNobody && mine.thread != now.thread && time_of(known, mine.thread) < mine.time)
        cell.reads[1] = mine;
      mine = now;
    }
  }
}

}  // namespace

void access(const void* address, size_t bytes, bool writes, bool atomic, const void* line) {
  Region* region = on ? region_of(address) : nullptr;
  if (!region) return;
  const Knowledge& me = self().knowledge;
  check(*region, {me.number, me.time, atomic, line}, *me.known, address, bytes, writes);
}

void write_for(const Arrival& asker, const void* address, size_t bytes, const void* line) {
  Region* region = on ? region_of(address) : nullptr;
  if (region) check(*region, {asker.number, asker.time, false, line}, *asker.known, address, bytes, true);
}

// An arrival that does not release tells nothing: its time is before all that the thread did.
Arrival arrive(Knowledge& thread, bool releases) {
  return {thread.number, releases ? thread.time++ : 0, releases ? thread.known : nothing};
}

Known meet(const std::vector<Arrival>& arrivals) {
  Known base;
  for (const Arrival& arrival : arrivals) base = joined(base, arrival.known);
  auto all = std::make_shared<std::vector<Times>>(*base);
  std::shared_ptr<std::vector<uint32_t>> times;  // of the block of the arrival before, already ours to change
  uint32_t block = kNobody;
  for (const Arrival& arrival : arrivals) {
    if (block_of(arrival.number) != block) {
      block = block_of(arrival.number);
      Times& known = (*all)[block];
      times = known ? std::make_shared<std::vector<uint32_t>>(*known)
                    : std::make_shared<std::vector<uint32_t>>(block_threads);
      known = times;
    }
    uint32_t& time = (*times)[index_of(arrival.number)];
    time = std::max(time, arrival.time);
  }
  return all;
}

void learn(Knowledge& thread, const Known& known) { thread.known = joined(thread.known, known); }

void release(Knowledge& thread, const void* address) {
  Known& flag = flags[address];
  flag = joined(flag, meet({arrive(thread)}));
}

void acquire(Knowledge& thread, const void* address) {
  const auto flag = flags.find(address);
  if (flag != flags.end()) learn(thread, flag->second);
}

}  // namespace emulator::races

// The functions that the compiler calls before an access; the linker redirects the calls to these wrappers.
#define LLM_EXT_WRAP(name, bytes, writes)                                                                         \
  extern "C" void __real___asan_##name(const void* address);                                                      \
  extern "C" void __wrap___asan_##name(const void* address) {                                                     \
    __real___asan_##name(address);                                                                                \
    if (emulator::running()) emulator::races::access(address, bytes, writes, false, __builtin_return_address(0)); \
  }
LLM_EXT_WRAP(load1, 1, false)
LLM_EXT_WRAP(load2, 2, false)
LLM_EXT_WRAP(load4, 4, false)
LLM_EXT_WRAP(load8, 8, false)
LLM_EXT_WRAP(load16, 16, false)
LLM_EXT_WRAP(store1, 1, true)
LLM_EXT_WRAP(store2, 2, true)
LLM_EXT_WRAP(store4, 4, true)
LLM_EXT_WRAP(store8, 8, true)
LLM_EXT_WRAP(store16, 16, true)

extern "C" void __real___asan_loadN(const void* address, size_t bytes);
extern "C" void __wrap___asan_loadN(const void* address, size_t bytes) {
  __real___asan_loadN(address, bytes);
  if (emulator::running()) emulator::races::access(address, bytes, false, false, __builtin_return_address(0));
}
extern "C" void __real___asan_storeN(const void* address, size_t bytes);
extern "C" void __wrap___asan_storeN(const void* address, size_t bytes) {
  __real___asan_storeN(address, bytes);
  if (emulator::running()) emulator::races::access(address, bytes, true, false, __builtin_return_address(0));
}

// Longer copies of structs and arrays.
extern "C" void* __real_memcpy(void* to, const void* from, size_t bytes);
extern "C" void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  __real_memcpy(to, from, bytes);
  if (emulator::running()) {
    emulator::races::access(from, bytes, false, false, __builtin_return_address(0));
    emulator::races::access(to, bytes, true, false, __builtin_return_address(0));
  }
  return to;
}
extern "C" void* __real_memset(void* to, int value, size_t bytes);
extern "C" void* __wrap_memset(void* to, int value, size_t bytes) {
  __real_memset(to, value, bytes);
  if (emulator::running()) emulator::races::access(to, bytes, true, false, __builtin_return_address(0));
  return to;
}
