// Compiled without ASan's instrumentation, for speed, but linked with its runtime.
#include "scheduler.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <queue>

#ifndef __x86_64__
#error "the emulator switches fibers in the assembly of x86-64"
#endif

// Saves on the stack in use what a function must leave as it was, remembers the stack in *from, and goes on at `to`.
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, . - emulator_switch
)");
extern "C" void emulator_switch(void** from, void* to);

namespace emulator {

struct Stack {
  unsigned char* bottom;
};

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 32 * kPage;
// The number of threads of a non-cooperative grid in flight, unless one cluster has more.
constexpr int kThreadsInFlight = 2048;

// Ready threads, the highest key first.
using Ready = std::priority_queue<std::pair<uint64_t, Thread*>>;

struct State {
  uint64_t random = 1;
  const Launch* launch = nullptr;
  Ready ready;
  std::map<const uint32_t*, std::vector<Thread*>> flags;  // the waiting threads of each flag
  std::vector<DsmemStore> stores;                         // on its way
  uint64_t late_stores = 0;                               // of 4, how many pieces do not arrive at once
  bool uniform = true;
  Thread* current = nullptr;
  std::vector<std::unique_ptr<Cluster>> clusters;  // in flight
  std::vector<Stack*> stacks;                      // not in use
  Thread* ended = nullptr;                         // whose stack can be taken back
  void* host = nullptr;                            // stack pointer of run()
  const void* host_bottom = nullptr;
  size_t host_size = 0;
  void* host_fake_stack = nullptr;
};
State state;

uint64_t next_random() {  // splitmix64
  uint64_t z = (state.random += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

uint64_t draw(uint64_t below) { return (next_random() >> 32) * below >> 32; }

Stack* new_stack() {
  if (state.stacks.empty()) {
    // The page below is never touched: a thread that overruns its stack stops there.
    void* memory =
        mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) fault("no memory for the stack of a thread");
    state.stacks.push_back(new Stack{static_cast<unsigned char*>(memory) + kPage});
  }
  Stack* stack = state.stacks.back();
  state.stacks.pop_back();
  return stack;
}

// Filled with what is NaN in every floating type. ASan puts red zones around.
void new_shared(Block& block, size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, bytes) != 0) fault("no shared memory");
  memset(memory, 0xff, bytes);
  races::watch(memory, bytes, &block);
  block.shared = static_cast<unsigned char*>(memory);
}

void free_shared(Block& block) {
  races::forget(block.shared);
  free(block.shared);
}

// The first thing a fiber does after a switch.
void arrived(void* fake_stack, bool from_host) {
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
  if (from_host) {
    state.host_bottom = bottom;
    state.host_size = size;
  }
  if (state.ended) {
    state.stacks.push_back(state.ended->stack);
    state.ended->stack = nullptr;
    state.ended = nullptr;
  }
}

bool came_from_host = false;

// Leaves the fiber (or the host) that runs for the next that is ready, or for the host if none is.
void leave(void** stack_pointer, void** fake_stack) {
  Thread* before = state.current;
  came_from_host = before == nullptr;
  if (state.ready.empty()) {
    state.current = nullptr;
    __sanitizer_start_switch_fiber(fake_stack, state.host_bottom, state.host_size);
    emulator_switch(stack_pointer, state.host);
  } else {
    Thread* next = state.ready.top().second;
    state.ready.pop();
    state.current = next;
    if (next == before) return;
    __sanitizer_start_switch_fiber(fake_stack, next->stack->bottom, kStackBytes);
    emulator_switch(stack_pointer, next->stack_pointer);
  }
  arrived(fake_stack ? *fake_stack : nullptr, came_from_host);
}

void suspend() {
  Thread* thread = state.current;
  leave(&thread->stack_pointer, &thread->fake_stack);
}

void make_ready(Thread* thread) {
  // Threads in any order, or some far ahead of others: a forgotten barrier shows in the one where not in the other.
  if (draw(8) == 0) thread->priority = next_random();
  state.ready.emplace(state.uniform ? next_random() : thread->priority, thread);
}

std::string text(const Block& block) {
  const Launch& l = *state.launch;
  const std::string x = std::to_string(block.x);
  return l.grid_y == 1 && l.grid_z == 1 ? x
                                        : "(" + x + "," + std::to_string(block.y) + "," + std::to_string(block.z) + ")";
}

bool same(const char* a, const char* b) { return a == b || strcmp(a, b) == 0; }  // mostly the same literal

std::string text(const CallSite& site) {
  const char* name = strrchr(site.file, '/');
  return std::string(site.what) + " at " + (name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

// 0-3, 7 for {0, 1, 2, 3, 7}.
std::string ranges(const std::vector<unsigned>& sorted) {
  std::string out;
  for (size_t i = 0, j; i < sorted.size(); i = j) {
    for (j = i + 1; j < sorted.size() && sorted[j] == sorted[j - 1] + 1;) ++j;
    out += (out.empty() ? "" : ", ") + std::to_string(sorted[i]);
    if (j > i + 1) out += "-" + std::to_string(sorted[j - 1]);
  }
  return out;
}

[[noreturn]] void deadlock() {
  std::string why = "deadlock";
  for (const auto& cluster : state.clusters)
    for (const auto& block : cluster->blocks) {
      std::map<std::string, std::vector<unsigned>> sites;
      for (const auto& thread : block->threads)
        sites[thread->stack ? "wait: " + text(thread->site) : "ended"].push_back(thread->position.index);
      for (const auto& [site, ranks] : sites)
        why += "\n  block " + text(*block) + " threads " + ranges(ranks) + " " + site;
    }
  fault(why);
}

void end_thread() {
  Thread* thread = state.current;
  Block& block = *thread->block;
  if (!thread->copies.empty()) fault("a thread ended before its asynchronous copies had landed");
  if (thread->arrived) fault("a thread ended between cluster_arrive and cluster_wait");
  if (--block.live == 0) {
    for (const DsmemStore& store : state.stores)
      if (store.block == &block) fault("a block ended before its expected bytes had arrived");
    free_shared(block);
    --block.cluster->live;
  }
  state.ended = thread;
  leave(&thread->stack_pointer, nullptr);  // null: ASan may forget this stack
  abort();
}

void thread_main() {
  arrived(nullptr, came_from_host);
  state.launch->run(state.launch->call);
  end_thread();
}

void start(Thread& thread) {
  thread.stack = new_stack();
  void** top = reinterpret_cast<void**>(thread.stack->bottom + kStackBytes);
  *--top = nullptr;  // where thread_main would return to; keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&thread_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread.stack_pointer = top;
  make_ready(&thread);
}

// In a skewed order whole blocks and warps are ahead of others, lanes by a little.
uint64_t skewed_priority(uint64_t cluster, uint64_t block, uint64_t warp) {
  return (cluster & 0xffff) << 48 | (block & 0xffff) << 32 | (warp & 0xffff) << 16 | (next_random() & 0xffff);
}

void start_cluster(size_t number) {
  const Launch& l = *state.launch;
  const size_t row = l.grid_x / l.cluster;  // clusters
  auto cluster = std::make_unique<Cluster>();
  cluster->barrier.expected = size_t{l.threads} * l.cluster;
  cluster->live = l.cluster;
  const uint64_t cluster_priority = next_random();
  for (unsigned rank = 0; rank < l.cluster; ++rank) {
    auto block = std::make_unique<Block>();
    block->cluster = cluster.get();
    block->x = static_cast<unsigned>(number % row * l.cluster + rank);
    block->y = static_cast<unsigned>(number / row % l.grid_y);
    block->z = static_cast<unsigned>(number / row / l.grid_y);
    block->number = number * l.cluster + rank;
    new_shared(*block, l.shared_bytes);
    block->barrier.expected = l.threads;
    block->live = l.threads;
    block->warps.resize((l.threads + kWarp - 1) / kWarp);
    const uint64_t block_priority = next_random();
    uint64_t warp_priority = 0;
    for (unsigned i = 0; i < l.threads; ++i) {
      if (i % kWarp == 0) warp_priority = next_random();
      ++block->warps[i / kWarp].meeting.expected;
      auto thread = std::make_unique<Thread>();
      thread->block = block.get();
      thread->position = {i, block->x, block->y, block->z, block->shared};
      races::begin(thread->knowledge, block->number, i);
      thread->priority = skewed_priority(cluster_priority, block_priority, warp_priority);
      block->threads.push_back(std::move(thread));
    }
    cluster->blocks.push_back(std::move(block));
  }
  for (auto& block : cluster->blocks)
    for (auto& thread : block->threads) start(*thread);
  state.clusters.push_back(std::move(cluster));
}

void wake(std::vector<Thread*>& threads) {
  for (Thread* thread : threads) make_ready(thread);
  threads.clear();
}

// Lets threads go on that found the same value of a flag twice: it may be the one that they need. Whether there are
// any.
bool resume_pollers() {
  bool found = false;
  for (auto& flag : state.flags) {
    std::vector<Thread*> others;
    for (Thread* thread : flag.second) {
      if (thread->polling && !thread->spinning) {
        thread->spinning = found = true;
        make_ready(thread);
      } else {
        others.push_back(thread);
      }
    }
    flag.second = others;
  }
  return found;
}

// Calls last() when all of the meeting have come, and only then goes on.
template <typename Last>
void wait_for_all(Meeting& meeting, CallSite site, Last last) {
  Thread* thread = state.current;
  thread->spinning = false;
  thread->site = site;
  if (meeting.waiting.empty()) meeting.site = site;
  meeting.waiting.push_back(thread);
  if (meeting.waiting.size() == meeting.expected) {
    last();
    wake(meeting.waiting);
  }
  suspend();
}

// Lets others run, perhaps, after something that they may wait for.
void offer() {
  if (draw(2)) return;
  make_ready(state.current);
  suspend();
}

void end_phase_if_all_is_here(Mbarrier& mbarrier) {
  if (!mbarrier.expected || mbarrier.pending != 0) return;
  mbarrier.expected = false;
  const uint64_t last = mbarrier.phase++ % 2;
  mbarrier.known[last] = races::meet(mbarrier.arrivals);
  // The thread that sets the expected bytes is of the own block, and arrives once in a phase.
  mbarrier.in_block[last] = races::meet({mbarrier.own});
  mbarrier.arrivals.clear();
  wake(mbarrier.waiting);
}

void deliver(size_t i) {
  std::swap(state.stores[i], state.stores.back());
  const DsmemStore store = state.stores.back();
  state.stores.pop_back();
  races::write_for(store.sender, store.to, sizeof store.words, store.line);
  memcpy(store.to, store.words, sizeof store.words);
  store.mbarrier->pending -= sizeof store.words;
  store.mbarrier->arrivals.push_back(store.sender);
  end_phase_if_all_is_here(*store.mbarrier);
}

size_t offset_in_shared(const Block& block, const void* address, size_t bytes, CallSite site) {
  const auto offset = static_cast<const unsigned char*>(address) - block.shared;
  if (offset < 0 || offset + bytes > state.launch->shared_bytes) fault("not in shared memory", site);
  return static_cast<size_t>(offset);
}

Mbarrier& mbarrier_of(Block& block, size_t at, CallSite site, const void* line) {
  const auto mbarrier = block.mbarriers.find(at);
  if (mbarrier == block.mbarriers.end()) fault("no mbarrier was initialized there", site);
  races::access(block.shared + at, sizeof(uint64_t), false, true, line);
  return mbarrier->second;
}

}  // namespace

void seed(uint64_t value) { state.random = value * 0x9e3779b97f4a7c15u + 1; }
const Launch& launch() { return *state.launch; }
const Position& position() { return state.current->position; }
Thread& self() { return *state.current; }
bool running() { return state.current != nullptr; }

void fault(const std::string& why, CallSite site) {
  std::string where;
  if (state.launch) {
    char name[1024] = "";
    __sanitizer_symbolize_pc(static_cast<char*>(const_cast<void*>(state.launch->function)) + 1, "%f", name,
                             sizeof name);
    where += std::string("kernel ") + name + ": ";
  }
  if (state.current)
    where += "block " + text(*state.current->block) + " thread " + std::to_string(state.current->position.index) + ": ";
  if (site.line) where += text(site) + ": ";
  fprintf(stderr, "emulator: %s%s\n", where.c_str(), why.c_str());
  fflush(stderr);
  _exit(kFault);
}

void fault(const char* why, CallSite site) { fault(std::string(why), site); }

void run(const Launch& l) {
  state.launch = &l;
  state.uniform = draw(2) == 0;
  races::begin(l.blocks(), l.threads);
  const size_t clusters = l.blocks() / l.cluster;
  // Blocks that do not have to run at the same time run one after the other, or a few together, in any order.
  const size_t most = std::clamp<size_t>(kThreadsInFlight / (l.cluster * l.threads), 1, 4);
  const size_t in_flight = l.all_resident ? clusters : 1 + draw(most);
  std::vector<size_t> order(clusters);
  for (size_t i = 0; i < clusters; ++i) order[i] = i;
  for (size_t i = clusters; i > 1; --i) std::swap(order[i - 1], order[draw(i)]);

  state.late_stores = draw(5);
  while (true) {
    auto& live = state.clusters;
    live.erase(std::remove_if(live.begin(), live.end(), [](const auto& cluster) { return cluster->live == 0; }),
               live.end());
    while (!order.empty() && live.size() < in_flight) {
      start_cluster(order.back());
      order.pop_back();
    }
    if (live.empty()) break;
    if (state.ready.empty()) {
      if (!state.stores.empty()) {
        deliver(draw(state.stores.size()));
      } else if (!resume_pollers()) {
        deadlock();
      }
      continue;
    }
    leave(&state.host, &state.host_fake_stack);
  }
  state.launch = nullptr;
}

void block_barrier(CallSite site) {
  Meeting& meeting = state.current->block->barrier;
  wait_for_all(meeting, site, [&] {
    std::vector<Arrival> arrivals;
    for (Thread* thread : meeting.waiting) arrivals.push_back(races::arrive(thread->knowledge));
    const Known known = races::meet(arrivals);
    for (Thread* thread : meeting.waiting) races::learn(thread->knowledge, known);
  });
}

void cluster_arrive(CallSite site, bool releases) {
  Thread& thread = *state.current;
  SplitBarrier& barrier = thread.block->cluster->barrier;
  if (thread.arrived) fault("arrives twice without waiting", site);
  thread.arrived = true;
  thread.phase = barrier.phase;
  barrier.arrivals.push_back(races::arrive(thread.knowledge, releases));
  if (barrier.arrivals.size() == barrier.expected) {
    barrier.known[barrier.phase++ % 2] = races::meet(barrier.arrivals);
    barrier.arrivals.clear();
    wake(barrier.waiting);
  }
  offer();
}

void cluster_wait(CallSite site) {
  Thread& thread = *state.current;
  SplitBarrier& barrier = thread.block->cluster->barrier;
  if (!thread.arrived) fault("waits without having arrived", site);
  thread.site = site;
  if (barrier.phase == thread.phase) {
    barrier.waiting.push_back(&thread);
    suspend();
  }
  thread.arrived = false;
  // The next phase cannot end before this thread has arrived again.
  races::learn(thread.knowledge, barrier.known[thread.phase % 2]);
}

Slots exchange(const void* given, size_t bytes, CallSite site) { return exchange(given, bytes, site, nullptr); }

Slots exchange(const void* given, size_t bytes, CallSite site, const std::function<void(Slots)>& last) {
  if (bytes > kSlotBytes) fault("an exchange of too many bytes", site);
  Warp& warp = state.current->warp();
  if (!warp.meeting.waiting.empty() &&
      (warp.meeting.site.line != site.line || !same(warp.meeting.site.what, site.what)))
    fault("the lanes of a warp went apart: another lane waits in " + text(warp.meeting.site), site);
  const Slots slots = warp.slots[warp.turn];
  memcpy(slots[state.current->lane()], given, bytes);
  wait_for_all(warp.meeting, site, [&] {
    if (last) last(slots);
    warp.turn ^= 1;
  });
  return slots;
}

void raise_flag(uint32_t* flag, uint32_t value, bool releases) {
  offer();
  races::access(flag, sizeof *flag, true, true, __builtin_return_address(0));
  if (releases) races::release(state.current->knowledge, flag);
  *flag = value;
  const auto waiting = state.flags.find(flag);
  if (waiting != state.flags.end()) wake(waiting->second);
  offer();
}

void await_flag(const uint32_t* flag, uint32_t value, CallSite site) {
  offer();
  races::access(flag, sizeof *flag, false, true, __builtin_return_address(0));
  state.current->site = site;
  while (*flag < value) {
    state.flags[flag].push_back(state.current);
    suspend();
  }
  races::acquire(state.current->knowledge, flag);
}

uint32_t poll_flag(const uint32_t* flag, bool acquires, CallSite site) {
  offer();
  Thread& thread = *state.current;
  races::access(flag, sizeof *flag, false, true, __builtin_return_address(0));
  thread.site = site;
  if (thread.polled != flag) thread.spinning = false;
  bool again = thread.polled == flag && thread.polled_value == *flag;
  while (again) {
    state.flags[flag].push_back(&thread);
    thread.polling = true;
    suspend();
    thread.polling = false;
    again = thread.polled_value == *flag && !thread.spinning;
  }
  if (thread.polled_value != *flag) thread.spinning = false;
  thread.polled = flag;
  thread.polled_value = *flag;
  if (acquires) races::acquire(thread.knowledge, flag);
  return *flag;
}

void init_mbarrier(void* mbarrier, CallSite site, bool published) {
  Block& block = *state.current->block;
  const size_t at = offset_in_shared(block, mbarrier, sizeof(uint64_t), site);
  const auto [created, is_new] = block.mbarriers.try_emplace(at);
  if (!is_new) fault("initialized twice", site);
  created->second.published = published;
  races::access(mbarrier, sizeof(uint64_t), true, false, __builtin_return_address(0));
}

void publish_mbarriers() {
  for (auto& mbarrier : state.current->block->mbarriers) mbarrier.second.published = true;
}

void expect_bytes(void* mbarrier, int bytes, CallSite site) {
  Block& block = *state.current->block;
  offer();
  Mbarrier& counter =
      mbarrier_of(block, offset_in_shared(block, mbarrier, sizeof(uint64_t), site), site, __builtin_return_address(0));
  if (counter.expected) fault("expected bytes were set twice in one phase", site);
  counter.expected = true;
  counter.pending += bytes;
  counter.own = races::arrive(state.current->knowledge);
  counter.arrivals.push_back(counter.own);
  end_phase_if_all_is_here(counter);
  offer();
}

void wait_mbarrier(void* mbarrier, int parity, CallSite site, bool in_cluster) {
  Block& block = *state.current->block;
  Mbarrier& counter =
      mbarrier_of(block, offset_in_shared(block, mbarrier, sizeof(uint64_t), site), site, __builtin_return_address(0));
  state.current->site = site;
  while (counter.phase % 2 == static_cast<uint64_t>(parity)) {
    counter.waiting.push_back(state.current);
    suspend();
  }
  if (counter.phase == 0) return;
  const auto& known = in_cluster ? counter.known : counter.in_block;
  races::learn(state.current->knowledge, known[(counter.phase - 1) % 2]);
}

void store_dsmem_async(void* to, const void* words, void* mbarrier, int rank, CallSite site) {
  Thread& thread = *state.current;
  const auto& blocks = thread.block->cluster->blocks;
  if (rank < 0 || static_cast<size_t>(rank) >= blocks.size()) fault("no such block in the cluster", site);
  if (reinterpret_cast<uintptr_t>(to) % 16) fault("not aligned", site);
  Block& other = *blocks[rank];
  if (other.live == 0) fault("the other block has ended", site);
  DsmemStore store;
  memcpy(store.words, words, sizeof store.words);
  store.to = other.shared + offset_in_shared(*thread.block, to, sizeof store.words, site);
  store.block = &other;
  store.mbarrier = &mbarrier_of(other, offset_in_shared(*thread.block, mbarrier, sizeof(uint64_t), site), site,
                                __builtin_return_address(0));
  if (!store.mbarrier->published) fault("the mbarrier is not published: its initialization is not fenced", site);
  store.sender = races::arrive(thread.knowledge);
  store.line = __builtin_return_address(0);
  state.stores.push_back(store);
  if (draw(4) >= state.late_stores) deliver(state.stores.size() - 1);
  offer();
}

void copy_async(void* to, const void* from, size_t bytes, CallSite site) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes) fault("not aligned", site);
  offset_in_shared(*state.current->block, to, bytes, site);
  if (__asan_region_is_poisoned(const_cast<void*>(from), bytes)) fault("reads out of bounds", site);
  if (__asan_region_is_poisoned(to, bytes)) fault("goes where another copy has yet to land", site);
  races::access(to, bytes, true, false, __builtin_return_address(0));
  __asan_poison_memory_region(to, bytes);
  state.current->copies.push_back({to, from, bytes, __builtin_return_address(0)});
}

void copy_async_wait() {
  for (const Copy& copy : state.current->copies) {
    __asan_unpoison_memory_region(copy.to, copy.bytes);
    races::access(copy.from, copy.bytes, false, false, copy.line);
    races::access(copy.to, copy.bytes, true, false, copy.line);
    memcpy(copy.to, copy.from, copy.bytes);
  }
  state.current->copies.clear();
}

}  // namespace emulator
