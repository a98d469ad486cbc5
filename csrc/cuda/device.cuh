// The vocabulary that kernels are written in: which thread this is, shared memory, barriers, shuffles, flags between
// blocks, copies, matrix fragments, arithmetic, and how a kernel is launched. The only file that includes CUDA's
// headers or says PTX. tests/cuda_emulator has another one of the same name and contents for the CPU: what is added
// here is added there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/pack.h"
#include "cuda/rnn/plan.h"
#include "params/attention.h"
#include "params/linear.h"
#include "params/pooling.h"
#include "params/rnn.h"

// A kernel of at most `threads` threads a block, one block a multiprocessor; what is called from kernels; and its
// parameters, which are read where they lie.
#define LLM_EXT_KERNEL(threads) __global__ __launch_bounds__(threads, 1)
// The same where a multiprocessor has to have room for `blocks` of them.
#define LLM_EXT_SHARING_KERNEL(threads, blocks) __global__ __launch_bounds__(threads, blocks)
#define LLM_EXT_DEVICE __device__ __forceinline__
#define LLM_EXT_PARAMS const __grid_constant__

namespace llm_ext {
namespace cuda {

constexpr int kWarpThreads = 32;

// Blocks of threads are one-dimensional, grids have three dimensions; a cluster is a row of the grid along x.
LLM_EXT_DEVICE int thread_index() { return threadIdx.x; }
LLM_EXT_DEVICE int thread_count() { return blockDim.x; }
LLM_EXT_DEVICE int lane_index() { return threadIdx.x % kWarpThreads; }
LLM_EXT_DEVICE int warp_index() { return threadIdx.x / kWarpThreads; }
LLM_EXT_DEVICE int warp_count() { return blockDim.x / kWarpThreads; }
LLM_EXT_DEVICE int block_x() { return blockIdx.x; }
LLM_EXT_DEVICE int block_y() { return blockIdx.y; }
LLM_EXT_DEVICE int block_z() { return blockIdx.z; }
LLM_EXT_DEVICE int grid_x() { return gridDim.x; }
LLM_EXT_DEVICE int grid_y() { return gridDim.y; }

// The shared memory that the launch asked for, aligned to 16 bytes; contents do not matter.
LLM_EXT_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// All threads of the block arrive before any goes on; what they wrote before is seen after.
LLM_EXT_DEVICE void block_barrier() { __syncthreads(); }

// The same among all threads of a cluster, in two halves: what was written before a thread arrives, in the shared
// memory of any block, is seen by all who have waited. Every thread calls both, in turn.
LLM_EXT_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
LLM_EXT_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Counts bytes that arrive from other blocks of the cluster, phase by phase; it lies in shared memory.
struct alignas(8) Mailbox {
  uint64_t bits;
};

// One thread, once. Others may send after a barrier of the cluster that follows.
LLM_EXT_DEVICE void open_mailbox(Mailbox* mailbox) {
#if __CUDA_ARCH__ >= 900
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(mailbox));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(at) : "memory");
#endif
}
// One thread, once in each phase: how many bytes arrive in it. Some may have come already.
LLM_EXT_DEVICE void expect_mail(Mailbox* mailbox, int bytes) {
#if __CUDA_ARCH__ >= 900
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(mailbox));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
#endif
}
// Waits for the end of the phase of this parity, 0 first, then 1, 0 and so on: its bytes have been told and are here.
// Any thread, any number of times, but before the phase after it can end. What arrived is in this block's own shared
// memory, so a wait of the block's scope will do; that of the cluster would empty the first-level cache.
LLM_EXT_DEVICE void await_mail(Mailbox* mailbox, int parity) {
#if __CUDA_ARCH__ >= 900
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(mailbox));
  uint32_t done;
  do {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(at), "r"(parity)
        : "memory");
  } while (!done);
#endif
}
// Stores 16 bytes in the shared memory of the block of that rank in the cluster, and counts them in its mailbox, at
// some time before the end of the phase. `to` and `mailbox` are the same places in this block. Nothing else is ordered:
// no fence that would wait for other stores.
LLM_EXT_DEVICE void send(Pack<uint32_t, 4>* to, const Pack<uint32_t, 4>& words, Mailbox* mailbox, int rank) {
#if __CUDA_ARCH__ >= 900
  unsigned data = static_cast<unsigned>(__cvta_generic_to_shared(to));
  unsigned box = static_cast<unsigned>(__cvta_generic_to_shared(mailbox));
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(data) : "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(box) : "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(data),
               "r"(words.at[0]), "r"(words.at[1]), "r"(words.at[2]), "r"(words.at[3]), "r"(box)
               : "memory");
#endif
}

// The value of the lane whose number differs by the bits of `mask`; all lanes of the warp take part.
template <typename T>
LLM_EXT_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Flags between blocks of a grid. What the thread that raises a flag wrote before, and what it has seen others write
// (as after a barrier), is seen by the thread that awaited it, and by its block after a barrier.
LLM_EXT_DEVICE void raise_flag(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
// Waits until the flag is at least `value`. Its block must be known to run.
LLM_EXT_DEVICE void await_flag(const uint32_t* flag, uint32_t value) {
  uint32_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
  } while (seen < value);
}

// Copies 16 bytes, both sides aligned to 16, from global to shared memory, past the first-level cache. The thread sees
// them after copy_async_wait(), its block after a barrier that follows.
LLM_EXT_DEVICE void copy_async(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
LLM_EXT_DEVICE void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Brings 32 bytes around an address of global memory into the second-level cache; the address must be readable.
LLM_EXT_DEVICE void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// Numbers of 16 bits are computed as float.
LLM_EXT_DEVICE float widen(float x) { return x; }
LLM_EXT_DEVICE double widen(double x) { return x; }
LLM_EXT_DEVICE float widen(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
LLM_EXT_DEVICE float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
LLM_EXT_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
LLM_EXT_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
// Rounds to nearest, ties to even.
template <typename S>
LLM_EXT_DEVICE S narrow(Compute<S> x) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  } else if constexpr (std::is_same_v<S, Float16>) {
    return Float16{__half_as_ushort(__float2half_rn(x))};
  } else {
    return x;
  }
}
// A float whose low 13 bits of the mantissa are zero, rounded to nearest.
LLM_EXT_DEVICE float round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// float: relative error of exp below 2e-7 + 1e-7 |x|, of the quotient 2 units in the last place. double: exact to the
// last place.
LLM_EXT_DEVICE float exp_of(float x) { return __expf(x); }
LLM_EXT_DEVICE double exp_of(double x) { return exp(x); }
LLM_EXT_DEVICE float quotient(float a, float b) { return __fdividef(a, b); }
LLM_EXT_DEVICE double quotient(double a, double b) { return a / b; }
LLM_EXT_DEVICE double tanh_of(double x) { return tanh(x); }
// float: exact to the last place, of a normal number whose reciprocal is one.
LLM_EXT_DEVICE float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
LLM_EXT_DEVICE double reciprocal(double x) { return 1 / x; }
// Exact to the last two places.
LLM_EXT_DEVICE float exact_exp_of(float x) { return expf(x); }
LLM_EXT_DEVICE double exact_exp_of(double x) { return exp(x); }
LLM_EXT_DEVICE float log_of(float x) { return logf(x); }
LLM_EXT_DEVICE double log_of(double x) { return log(x); }
LLM_EXT_DEVICE float log1p_of(float x) { return log1pf(x); }
LLM_EXT_DEVICE double log1p_of(double x) { return log1p(x); }

// Matrix fragments. Lane 4 r + q (r < 8, q < 4) holds
//   of a tile of weights [16 x 16]: columns 4 q and 4 q + 1 of row r, then of row r + 8, then columns 4 q + 2 and 4 q +
//   3 of row r, and of row r + 8; of a tile of states [8 x 16]: row r, columns 4 q to 4 q + 3; of their product [16 x
//   8], weights times transposed states: (r, 2 q), (r, 2 q + 1), (r + 8, 2 q), (r + 8, 2 q + 1).
// The sum over columns may have any order, so these are the fragments of mma with columns in another order, the same on
// both sides. All lanes of the warp take part. Products are exact, sums are float.
LLM_EXT_DEVICE void multiply_add(float (&sum)[4], const Pack<uint32_t, 4>& weights, const Pack<uint32_t, 2>& states,
                                 BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(weights.at[0]), "r"(weights.at[1]), "r"(weights.at[2]), "r"(weights.at[3]), "r"(states.at[0]),
        "r"(states.at[1]));
}
LLM_EXT_DEVICE void multiply_add(float (&sum)[4], const Pack<uint32_t, 4>& weights, const Pack<uint32_t, 2>& states,
                                 Float16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(weights.at[0]), "r"(weights.at[1]), "r"(weights.at[2]), "r"(weights.at[3]), "r"(states.at[0]),
        "r"(states.at[1]));
}
// The same of float in TF32, as round_to_tf32 leaves them, in two halves: columns 4 q and 4 q + 1, row r and row r + 8
// in turn, then columns 4 q + 2 and 4 q + 3.
LLM_EXT_DEVICE void multiply_add_tf32(float (&sum)[4], const Pack<uint32_t, 4>& first, const Pack<uint32_t, 4>& second,
                                      const Pack<uint32_t, 4>& states) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Pack<uint32_t, 4>& weights = half == 0 ? first : second;
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(weights.at[0]), "r"(weights.at[1]), "r"(weights.at[2]), "r"(weights.at[3]), "r"(states.at[2 * half]),
          "r"(states.at[2 * half + 1]));
  }
}

// How a kernel is launched.
struct LaunchShape {
  unsigned grid_x = 1, grid_y = 1, grid_z = 1;
  unsigned threads = 1;       // a block
  unsigned cluster = 1;       // blocks a cluster, along x; grid_x is a multiple
  size_t shared_bytes = 0;    // a block
  bool all_resident = false;  // the launch fails unless all blocks run at the same time
};

// What a kernel may ask for beyond the usual. The same for every launch, so that launches by several threads of the
// host do not get in each other's way.
struct KernelLimits {
  const void* kernel;

  cudaError_t allow_all_shared_memory() const {
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  cudaError_t allow_large_clusters() const {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
};

// Queues the kernel. Returns what went wrong, and leaves no error behind for others to find.
template <typename Params>
int launch(void (*kernel)(Params), const LaunchShape& shape, const Params& params, void* stream) {
  const KernelLimits limits = {reinterpret_cast<const void*>(kernel)};
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > 48 * 1024) error = limits.allow_all_shared_memory();
  if (error == cudaSuccess && shape.cluster > 8) error = limits.allow_large_clusters();
  if (error == cudaSuccess) {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(shape.grid_x, shape.grid_y, shape.grid_z);
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    if (shape.cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs].val.clusterDim.x = shape.cluster;
      attributes[config.numAttrs].val.clusterDim.y = 1;
      attributes[config.numAttrs].val.clusterDim.z = 1;
      ++config.numAttrs;
    }
    if (shape.all_resident) {
      attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
      attributes[config.numAttrs].val.cooperative = 1;
      ++config.numAttrs;
    }
    error = cudaLaunchKernelEx(&config, kernel, params);
  }
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// Queues the zeroing of memory.
inline int zero(void* memory, size_t bytes, void* stream) {
  const cudaError_t error = cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// What the rule for launch parameters has to know about a device, but for its clusters.
inline int query_device(int device, DeviceFacts* facts) {
  int major = 0, minor = 0, shared = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&facts->sm_count, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) cudaGetLastError();
  facts->sm = 10 * major + minor;
  facts->shared_bytes = shared;
  return error;
}

inline const char* error_text_of(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Whether a CUDA graph is being captured from the stream.
inline bool is_captured(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) != cudaSuccess) cudaGetLastError();
  return status != cudaStreamCaptureStatusNone;
}

// How many clusters of this shape run at the same time on the current device; 0 where there are none.
template <typename Params>
int resident_clusters(void (*kernel)(Params), const LaunchShape& shape) {
  const KernelLimits limits = {reinterpret_cast<const void*>(kernel)};
  int count = 0;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = shape.cluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.cluster);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaError_t error = limits.allow_all_shared_memory();
  if (error == cudaSuccess) error = limits.allow_large_clusters();
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

}  // namespace cuda
}  // namespace llm_ext
