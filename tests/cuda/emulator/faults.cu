// Small kernels with planted faults, which the emulator must find. Without its fault, each kernel is right.
#include <cstdio>

#include "cuda/device.cuh"
#include "records.h"
#include "scheduler.h"

namespace {

using namespace llm_ext;
using namespace llm_ext::cuda;

constexpr int kThreads = 64;

struct Params {
  bool faulty;
  const float* in;  // [blocks * kThreads]
  float* out;       // [blocks * kThreads]
  uint32_t* flags;  // [blocks], zero
};

LLM_EXT_DEVICE int block_start() { return block_x() * kThreads; }

// Every thread reads what its neighbour wrote to shared memory.
LLM_EXT_KERNEL(kThreads) void missing_block_barrier(LLM_EXT_PARAMS Params p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[thread_index()] = p.in[block_start() + thread_index()];
  if (!p.faulty) block_barrier();
  p.out[block_start() + thread_index()] = shared[(thread_index() + 1) % kThreads];
}

// The same twice in the same memory: the second write must wait for the readers of the first.
LLM_EXT_KERNEL(kThreads) void missing_barrier_before_write(LLM_EXT_PARAMS Params p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  float sum = 0;
  for (int i = 0; i < 2; ++i) {
    shared[thread_index()] = p.in[block_start() + thread_index()];
    block_barrier();
    sum += shared[(thread_index() + kThreads / 2) % kThreads];
    if (!p.faulty) block_barrier();
  }
  p.out[block_start() + thread_index()] = sum;
}

LLM_EXT_KERNEL(kThreads) void write_beyond_global(LLM_EXT_PARAMS Params p) {
  const int last = grid_x() * kThreads - 1;
  const int i = block_start() + thread_index();
  p.out[i == last && p.faulty ? i + 1 : i] = p.in[i];
}

LLM_EXT_KERNEL(kThreads) void read_beyond_global(LLM_EXT_PARAMS Params p) {
  p.out[block_start() + thread_index()] = p.in[block_start() + thread_index() + p.faulty];
}

LLM_EXT_KERNEL(kThreads) void write_beyond_shared(LLM_EXT_PARAMS Params p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[thread_index() + p.faulty] = p.in[block_start() + thread_index()];
  p.out[block_start() + thread_index()] = shared[thread_index() + p.faulty];
}

LLM_EXT_KERNEL(kThreads) void misaligned(LLM_EXT_PARAMS Params p) {
  const int i = block_start() + thread_index();
  if (thread_index() % 4 == 0)
    *reinterpret_cast<Pack<float, 4>*>(p.out + i) = *reinterpret_cast<const Pack<float, 4>*>(p.in + i + p.faulty);
}

// A thread returns early, and the others wait at the barrier.
LLM_EXT_KERNEL(kThreads) void deadlock_at_barrier(LLM_EXT_PARAMS Params p) {
  if (p.faulty && thread_index() == 5) return;
  block_barrier();
  p.out[block_start() + thread_index()] = p.in[block_start() + thread_index()];
}

// Each block waits for the previous one; with the fault, the first waits for the last.
LLM_EXT_KERNEL(kThreads) void deadlock_of_flags(LLM_EXT_PARAMS Params p) {
  if (thread_index() == 0) {
    if (block_x() > 0) await_flag(p.flags + block_x() - 1, 1);
    if (p.faulty && block_x() == 0) await_flag(p.flags + grid_x() - 1, 1);
    raise_flag(p.flags + block_x(), 1);
  }
  p.out[block_start() + thread_index()] = p.in[block_start() + thread_index()];
}

LLM_EXT_KERNEL(kThreads) void deadlock_of_cluster(LLM_EXT_PARAMS Params p) {
  if (!p.faulty || block_x() % 2 == 0) {
    cluster_arrive();
    cluster_wait();
  }
  p.out[block_start() + thread_index()] = p.in[block_start() + thread_index()];
}

// Each block reads the output of the previous block.
LLM_EXT_KERNEL(kThreads) void flag_before_data(LLM_EXT_PARAMS Params p) {
  const int i = thread_index(), mine = block_x(), before = (block_x() + grid_x() - 1) % grid_x();
  if (p.faulty && i == 0) raise_flag(p.flags + mine, 1);
  p.out[mine * kThreads + i] = p.in[mine * kThreads + i];
  block_barrier();
  if (!p.faulty && i == 0) raise_flag(p.flags + mine, 1);
  if (i == 0) await_flag(p.flags + before, 1);
  block_barrier();
  if (p.out[before * kThreads + i] != p.in[before * kThreads + i]) p.out[mine * kThreads + i] = 0;
}

// A flag orders the writes of one thread only: without a barrier, those of the others may be missing.
LLM_EXT_KERNEL(kThreads) void flag_without_barrier(LLM_EXT_PARAMS Params p) {
  const int i = thread_index(), mine = block_x(), before = (block_x() + grid_x() - 1) % grid_x();
  p.out[mine * kThreads + i] = p.in[mine * kThreads + i];
  if (!p.faulty) block_barrier();
  if (i == 0) {
    raise_flag(p.flags + mine, 1);
    await_flag(p.flags + before, 1);
  }
  block_barrier();
  if (p.out[before * kThreads + i] != p.in[before * kThreads + i]) p.out[mine * kThreads + i] = 0;
}

LLM_EXT_KERNEL(kThreads) void race_of_blocks(LLM_EXT_PARAMS Params p) {
  const int i = thread_index();
  p.out[block_start() + i] = p.in[block_start() + i];
  if (p.faulty && i == 0) p.out[0] = p.in[0];
}

// The two blocks of a cluster exchange their numbers three times by asynchronous DSMEM stores, through two alternating
// mbarriers and buffers. A block stores for the third time only after it has received the second data, and the other
// block sent those after it had read the first. Faults are planted by omission.
struct Leave {
  bool start = false, barrier = false, second_buffer = false, second_mbarrier = false, wait = false, tell = false;
};
LLM_EXT_DEVICE void exchange_in_cluster(const Params& p, Leave out) {
  auto* mbarriers = reinterpret_cast<Mbarrier*>(shared_memory());
  auto* buffers = reinterpret_cast<Pack<uint32_t, 4>*>(shared_memory() + 16);
  const auto* numbers = reinterpret_cast<const Pack<uint32_t, 4>*>(p.in + block_start());
  const int i = thread_index(), other = 1 - block_x() % 2;
  if (i < 2) init_mbarrier(mbarriers + i);
  if (!out.start) {
    cluster_arrive();
    cluster_wait();
  }
  block_barrier();
  float sum = 0;
  for (int n = 0; n < 3; ++n) {
    const int turn = n % 2;
    auto* mbarrier = mbarriers + (out.second_mbarrier ? 0 : turn);
    auto* buffer = buffers + (out.second_buffer ? 0 : turn) * kThreads / 4;
    if (i == 0 && !(out.tell && n == 1)) expect_bytes(mbarrier, kThreads * sizeof(float));
    if (i % 4 == 0) store_dsmem_async(buffer + i / 4, numbers[i / 4], mbarrier, other);
    if (!(out.wait && n == 1)) wait_mbarrier(mbarrier, out.second_mbarrier ? n % 2 : n / 2);
    sum += reinterpret_cast<const float*>(buffer)[(i + 7) % kThreads];
    if (!out.barrier) block_barrier();
  }
  p.out[block_start() + i] = sum;
}
LLM_EXT_KERNEL(kThreads) void dsmem_store_before_start(LLM_EXT_PARAMS Params p) {
  exchange_in_cluster(p, {.start = p.faulty});
}
LLM_EXT_KERNEL(kThreads) void dsmem_store_where_others_read(LLM_EXT_PARAMS Params p) {
  exchange_in_cluster(p, {.barrier = p.faulty});
}
LLM_EXT_KERNEL(kThreads) void dsmem_store_to_one_buffer(LLM_EXT_PARAMS Params p) {
  exchange_in_cluster(p, {.second_buffer = p.faulty});
}
LLM_EXT_KERNEL(kThreads) void bytes_of_two_phases(LLM_EXT_PARAMS Params p) {
  exchange_in_cluster(p, {.second_mbarrier = p.faulty});
}
LLM_EXT_KERNEL(kThreads) void read_before_bytes_arrive(LLM_EXT_PARAMS Params p) {
  exchange_in_cluster(p, {.wait = p.faulty});
}
LLM_EXT_KERNEL(kThreads) void deadlock_of_mbarrier(LLM_EXT_PARAMS Params p) {
  exchange_in_cluster(p, {.tell = p.faulty});
}

LLM_EXT_DEVICE void copy_and_read(const Params& p, bool wait_before, bool wait_after) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  if (thread_index() % 4 == 0) copy_async(shared + thread_index(), p.in + block_start() + thread_index());
  if (wait_before) copy_async_wait();
  block_barrier();
  p.out[block_start() + thread_index()] = shared[thread_index()];
  if (wait_after) copy_async_wait();
}
LLM_EXT_KERNEL(kThreads) void read_before_copy_lands(LLM_EXT_PARAMS Params p) { copy_and_read(p, !p.faulty, true); }

LLM_EXT_KERNEL(kThreads) void copy_nobody_waits_for(LLM_EXT_PARAMS Params p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = block_start() + thread_index();
  if (thread_index() % 4 == 0) copy_async(shared + thread_index(), p.in + i);
  if (!p.faulty) copy_async_wait();
  p.out[i] = p.in[i];
}

// The lanes of a warp call different shuffles at the same time.
LLM_EXT_KERNEL(kThreads) void lanes_apart(LLM_EXT_PARAMS Params p) {
  float x = p.in[block_start() + thread_index()];
  if (p.faulty && lane_index() < 16) {
    x = shuffle_xor(x, 1);
  } else {
    x = shuffle_xor(x, 2);
  }
  p.out[block_start() + thread_index()] = x;
}

struct Test {
  const char* name;
  void (*kernel)(Params);
  unsigned cluster;
  bool all_resident;
};
#define LLM_EXT_TEST(kernel, ...) {#kernel, kernel, __VA_ARGS__}
constexpr Test kTests[] = {
    LLM_EXT_TEST(missing_block_barrier, 1, false),
    LLM_EXT_TEST(missing_barrier_before_write, 1, false),
    LLM_EXT_TEST(write_beyond_global, 1, false),
    LLM_EXT_TEST(read_beyond_global, 1, false),
    LLM_EXT_TEST(write_beyond_shared, 1, false),
    LLM_EXT_TEST(misaligned, 1, false),
    LLM_EXT_TEST(deadlock_at_barrier, 1, false),
    LLM_EXT_TEST(deadlock_of_flags, 1, true),
    LLM_EXT_TEST(deadlock_of_cluster, 2, false),
    LLM_EXT_TEST(flag_before_data, 1, true),
    LLM_EXT_TEST(flag_without_barrier, 1, true),
    LLM_EXT_TEST(race_of_blocks, 1, false),
    LLM_EXT_TEST(dsmem_store_before_start, 2, false),
    LLM_EXT_TEST(dsmem_store_where_others_read, 2, false),
    LLM_EXT_TEST(dsmem_store_to_one_buffer, 2, false),
    LLM_EXT_TEST(bytes_of_two_phases, 2, false),
    LLM_EXT_TEST(read_before_bytes_arrive, 2, false),
    LLM_EXT_TEST(deadlock_of_mbarrier, 2, false),
    LLM_EXT_TEST(read_before_copy_lands, 1, false),
    LLM_EXT_TEST(copy_nobody_waits_for, 1, false),
    LLM_EXT_TEST(lanes_apart, 1, false),
};

// One warp multiplies the fragments in its registers.
struct ProductParams {
  const Pack<uint32_t, 4>* a;     // [32]
  const Pack<uint32_t, 2>* b;     // [32]
  const Pack<uint32_t, 4>* tf32;  // [3, 32]
  Pack<float, 4>* sums;           // [3, 32] of bfloat16, float16 and TF32; in and out
};

LLM_EXT_KERNEL(32) void products(LLM_EXT_PARAMS ProductParams p) {
  const int lane = lane_index();
  multiply_add(p.sums[lane].at, p.a[lane], p.b[lane], BFloat16{});
  multiply_add(p.sums[32 + lane].at, p.a[lane], p.b[lane], Float16{});
  multiply_add_tf32(p.sums[64 + lane].at, p.tf32[lane], p.tf32[32 + lane], p.tf32[64 + lane]);
}

}  // namespace

int main(int, char** arguments) {
  const emulator::Records request(arguments[1]);
  emulator::Answer answer(arguments[2]);
  emulator::seed(static_cast<uint64_t>(request.number("seed")));
  emulator::races::watching(request.number("races", 1) != 0);
  const int64_t number = request.number("test", -1);
  if (number == -1) {
    std::string names;
    for (const Test& test : kTests) names += std::string(test.name) + " ";
    answer.add("names", names.data(), names.size());
  } else if (number == -2) {
    LaunchShape shape;
    shape.threads = 32;
    const size_t bytes = request.bytes("sums");
    const ProductParams p = {request.data<const Pack<uint32_t, 4>>("a"), request.data<const Pack<uint32_t, 2>>("b"),
                             request.data<const Pack<uint32_t, 4>>("tf32"), request.data<Pack<float, 4>>("sums")};
    if (launch(products, shape, p, nullptr)) return 1;
    answer.add("sums", p.sums, bytes);
  } else {
    const Test& test = kTests[number];
    LaunchShape shape;
    shape.grid_x = 4;
    shape.threads = kThreads;
    shape.cluster = test.cluster;
    shape.shared_bytes = (test.cluster > 1 ? 16 : 0) + test.cluster * kThreads * sizeof(float);
    shape.all_resident = test.all_resident;
    const size_t bytes = request.bytes("in");
    float* out = static_cast<float*>(emulator::device_memory(bytes));
    uint32_t* flags = static_cast<uint32_t*>(emulator::device_memory(4 * sizeof(uint32_t)));
    zero(flags, 4 * sizeof(uint32_t), nullptr);
    const Params p = {request.number("faulty") != 0, request.data<const float>("in"), out, flags};
    if (launch(test.kernel, shape, p, nullptr)) return 1;
    answer.add("out", out, bytes);
  }
}
