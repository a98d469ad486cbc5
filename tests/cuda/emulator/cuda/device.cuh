// The vocabulary of csrc/cuda/device.cuh for the CPU: the same names and contracts; every thread is a fiber.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/device_facts.h"
#include "cuda/pack.h"
#include "device.h"
#include "params/types.h"

#define LLM_EXT_KERNEL(threads)
#define LLM_EXT_SHARING_KERNEL(threads, blocks)
#define LLM_EXT_DEVICE inline
#define LLM_EXT_PARAMS const
// The last parameters of functions that can wait: the line of the call.
#define LLM_EXT_LINE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace llm_ext {
namespace cuda {

inline int thread_index() { return static_cast<int>(emulator::position().index); }
inline int thread_count() { return static_cast<int>(emulator::launch().threads); }
inline int lane_index() { return thread_index() % kWarpThreads; }
inline int warp_index() { return thread_index() / kWarpThreads; }
inline int warp_count() { return thread_count() / kWarpThreads; }
inline int block_x() { return static_cast<int>(emulator::position().block_x); }
inline int block_y() { return static_cast<int>(emulator::position().block_y); }
inline int block_z() { return static_cast<int>(emulator::position().block_z); }
inline int grid_x() { return static_cast<int>(emulator::launch().grid_x); }
inline int grid_y() { return static_cast<int>(emulator::launch().grid_y); }

inline unsigned char* shared_memory() { return emulator::position().shared; }

inline void block_barrier(LLM_EXT_LINE) { emulator::block_barrier({"block_barrier", file, line}); }
inline void cluster_arrive(LLM_EXT_LINE) { emulator::cluster_arrive({"cluster_arrive", file, line}); }
inline void cluster_wait(LLM_EXT_LINE) { emulator::cluster_wait({"cluster_wait", file, line}); }

struct alignas(8) Mbarrier {
  uint64_t bits;
};
inline void init_mbarrier(Mbarrier* mbarrier, LLM_EXT_LINE) {
  emulator::init_mbarrier(mbarrier, {"init_mbarrier", file, line});
}
inline void expect_bytes(Mbarrier* mbarrier, int bytes, LLM_EXT_LINE) {
  emulator::expect_bytes(mbarrier, bytes, {"expect_bytes", file, line});
}
inline void wait_mbarrier(Mbarrier* mbarrier, int parity, LLM_EXT_LINE) {
  emulator::wait_mbarrier(mbarrier, parity, {"wait_mbarrier", file, line});
}
inline void store_dsmem_async(Pack<uint32_t, 4>* to, const Pack<uint32_t, 4>& words, Mbarrier* mbarrier, int rank,
                              LLM_EXT_LINE) {
  emulator::store_dsmem_async(to, &words, mbarrier, rank, {"store_dsmem_async", file, line});
}

template <typename T>
T shuffle_xor(T value, int mask, LLM_EXT_LINE) {
  const emulator::Slots slots = emulator::exchange(&value, sizeof value, {"shuffle_xor", file, line});
  memcpy(&value, slots[lane_index() ^ mask], sizeof value);
  return value;
}
template <typename T>
T shuffle(T value, int lane, LLM_EXT_LINE) {
  const emulator::CallSite site = {"shuffle", file, line};
  if (lane < 0 || lane >= kWarpThreads) emulator::fault("a shuffle from a lane that does not exist", site);
  const emulator::Slots slots = emulator::exchange(&value, sizeof value, site);
  memcpy(&value, slots[lane], sizeof value);
  return value;
}

inline void raise_flag(uint32_t* flag, uint32_t value) { emulator::raise_flag(flag, value); }
inline void await_flag(const uint32_t* flag, uint32_t value, LLM_EXT_LINE) {
  emulator::await_flag(flag, value, {"await_flag", file, line});
}

inline void copy_async(void* shared, const void* global, LLM_EXT_LINE) {
  emulator::copy_async(shared, global, 16, {"copy_async", file, line});
}
inline void copy_async_wait() { emulator::copy_async_wait(); }

inline void prefetch(const void* global) { static_cast<void>(*static_cast<const volatile unsigned char*>(global)); }

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return emulator::float_of_bfloat16(x.bits); }
inline float widen(Float16 x) { return emulator::float_of_float16(x.bits); }
inline uint32_t bits_of(float x) { return emulator::bits_of(x); }
inline float float_of(uint32_t bits) { return emulator::float_of(bits); }
template <typename S>
S narrow(Compute<S> x) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return BFloat16{emulator::bfloat16_of(x)};
  } else if constexpr (std::is_same_v<S, Float16>) {
    return Float16{emulator::float16_of(x)};
  } else {
    return x;
  }
}
inline float round_to_tf32(float x) { return emulator::tf32_of(x); }

inline float exp_of(float x) { return emulator::exp_approximately(x); }
inline double exp_of(double x) { return std::exp(x); }
inline float quotient(float a, float b) { return emulator::quotient_approximately(a, b); }
inline double quotient(double a, double b) { return a / b; }
inline double tanh_of(double x) { return std::tanh(x); }
inline float reciprocal(float x) { return emulator::quotient_approximately(1, x); }
inline double reciprocal(double x) { return 1 / x; }
inline float exact_exp_of(float x) { return std::exp(x); }
inline double exact_exp_of(double x) { return std::exp(x); }
inline float log_of(float x) { return std::log(x); }
inline double log_of(double x) { return std::log(x); }

// Registers in the order in which csrc/cuda/device.cuh passes them to the instruction.
inline void multiply_add(float (&sum)[4], const Pack<uint32_t, 4>& weights, const Pack<uint32_t, 2>& states, BFloat16,
                         LLM_EXT_LINE) {
  emulator::mma_m16n8k16(sum, weights.at, states.at, emulator::float_of_bfloat16, {"multiply_add", file, line});
}
inline void multiply_add(float (&sum)[4], const Pack<uint32_t, 4>& weights, const Pack<uint32_t, 2>& states, Float16,
                         LLM_EXT_LINE) {
  emulator::mma_m16n8k16(sum, weights.at, states.at, emulator::float_of_float16, {"multiply_add", file, line});
}
inline void multiply_add_tf32(float (&sum)[4], const Pack<uint32_t, 4>& first, const Pack<uint32_t, 4>& second,
                              const Pack<uint32_t, 4>& states, LLM_EXT_LINE) {
  const emulator::CallSite site = {"multiply_add_tf32", file, line};
  emulator::mma_m16n8k8_tf32(sum, first.at, {states.at[0], states.at[1]}, site);
  emulator::mma_m16n8k8_tf32(sum, second.at, {states.at[2], states.at[3]}, site);
}

struct LaunchShape {
  int64_t grid_x = 1, grid_y = 1, grid_z = 1;
  unsigned threads = 1;
  unsigned cluster = 1;
  size_t shared_bytes = 0;
  bool all_resident = false;
};

template <typename Params>
struct KernelCall {
  void (*kernel)(Params);
  const Params& params;

  void run() const { kernel(params); }
};

template <typename Params>
int launch(void (*kernel)(Params), const LaunchShape& shape, const Params& params, void*) {
  emulator::Launch launch;
  launch.grid_x = shape.grid_x;
  launch.grid_y = shape.grid_y;
  launch.grid_z = shape.grid_z;
  launch.threads = shape.threads;
  launch.cluster = shape.cluster;
  launch.shared_bytes = shape.shared_bytes;
  launch.all_resident = shape.all_resident;
  launch.function = reinterpret_cast<const void*>(kernel);
  const KernelCall<Params> call = {kernel, params};
  launch.run = [](const void* call) { static_cast<const KernelCall<Params>*>(call)->run(); };
  launch.call = &call;
  return emulator::run_on_device(launch);
}

inline int zero(void* memory, size_t bytes, void*) {
  memset(memory, 0, bytes);
  return 0;
}

inline int query_device(int, DeviceFacts* facts) {
  facts->sm = emulator::device.sm;
  facts->sm_count = emulator::device.sm_count;
  facts->shared_bytes = emulator::device.shared_bytes;
  return 0;
}

inline const char* error_text_of(int error) { return error ? "the emulated device refuses" : "no error"; }
inline int cleared(int error) { return error; }
inline int create_event(void**) { return 0; }
inline int queue_event(void*, void*) { return 0; }
inline int queue_wait(void*, void*) { return 0; }
inline uint64_t captured_graph(void*) { return 0; }

template <typename Params>
int resident_clusters(void (*)(Params), const LaunchShape& shape) {
  const int sm = emulator::device.sm < emulator::device.code ? emulator::device.sm : emulator::device.code;
  return sm >= 90 ? emulator::device.sm_count / static_cast<int>(shape.cluster) : 0;
}

}  // namespace cuda
}  // namespace llm_ext
