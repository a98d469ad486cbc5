// The vocabulary of the kernels: thread indices, shared memory, barriers, shuffles, flags between blocks, copies,
// matrix fragments, arithmetic and launches. The only file that includes CUDA's headers or contains PTX. The emulator
// (tests/cuda/emulator/cuda/device.cuh) implements the same vocabulary for the CPU: add to both.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/device_facts.h"
#include "cuda/pack.h"
#include "params/types.h"

// A kernel with at most `threads` threads per block and one block per multiprocessor.
#define LLM_EXT_KERNEL(threads) __global__ __launch_bounds__(threads, 1)
// A kernel of which `blocks` blocks must fit on a multiprocessor.
#define LLM_EXT_SHARING_KERNEL(threads, blocks) __global__ __launch_bounds__(threads, blocks)
// A function that kernels call.
#define LLM_EXT_DEVICE __device__ __forceinline__
// The parameter of a kernel, read from constant memory without a copy.
#define LLM_EXT_PARAMS const __grid_constant__

namespace llm_ext {
namespace cuda {

// Blocks are one-dimensional, grids three-dimensional. The blocks of a cluster are adjacent along x.
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

// The shared memory that the launch requested, aligned to 16 bytes and not initialized.
LLM_EXT_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// Waits for all threads of the block. Writes before the barrier are visible after it.
LLM_EXT_DEVICE void block_barrier() { __syncthreads(); }

// Clusters need code compiled for 9.0 or higher (resident_clusters() below asks the loaded code); other code traps.

// A barrier of all threads of a cluster, in two halves. Writes before the arrival, to the shared memory of any block of
// the cluster, are visible after the wait. Every thread calls both, alternately.
LLM_EXT_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  __trap();
#endif
}
LLM_EXT_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// A barrier in shared memory that counts the bytes of asynchronous DSMEM stores, phase by phase.
struct alignas(8) Mbarrier {
  uint64_t bits;
};

// One thread calls this once. Other blocks may store after a subsequent barrier of the cluster.
LLM_EXT_DEVICE void init_mbarrier(Mbarrier* mbarrier) {
#if __CUDA_ARCH__ >= 900
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(mbarrier));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(at) : "memory");
#else
  __trap();
#endif
}
// Sets the number of bytes expected in this phase. One thread calls this once per phase; bytes may already have
// arrived.
LLM_EXT_DEVICE void expect_bytes(Mbarrier* mbarrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(mbarrier));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
#else
  __trap();
#endif
}
// Waits for the end of the phase of this parity (0, 1, 0, ...): its expected bytes are set and have arrived. Any thread
// may call this any number of times before the next phase can end. Scope cluster, because that is the scope at which
// st.async releases: PTX orders no weaker pair.
LLM_EXT_DEVICE void wait_mbarrier(Mbarrier* mbarrier, int parity) {
#if __CUDA_ARCH__ >= 900
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(mbarrier));
  uint32_t done;
  do {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(at), "r"(parity)
        : "memory");
  } while (!done);
#else
  __trap();
#endif
}
// Asynchronous DSMEM store: writes 16 bytes to the shared memory of the block `rank` of the cluster and counts them in
// its mbarrier before the phase ends. `to` and `mbarrier` are the addresses of the same objects in this block. Orders
// nothing else: a fence would wait for all other stores.
LLM_EXT_DEVICE void store_dsmem_async(Pack<uint32_t, 4>* to, const Pack<uint32_t, 4>& words, Mbarrier* mbarrier,
                                      int rank) {
#if __CUDA_ARCH__ >= 900
  unsigned data = static_cast<unsigned>(__cvta_generic_to_shared(to));
  unsigned counter = static_cast<unsigned>(__cvta_generic_to_shared(mbarrier));
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(data) : "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(counter) : "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(data),
               "r"(words.at[0]), "r"(words.at[1]), "r"(words.at[2]), "r"(words.at[3]), "r"(counter)
               : "memory");
#else
  __trap();
#endif
}

// The value of lane `lane_index() ^ mask`. All lanes of the warp call this.
template <typename T>
LLM_EXT_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// The value of lane `lane`, likewise. Lanes may name different lanes, from 0 to 31.
template <typename T>
LLM_EXT_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// Flags between blocks of a grid (release and acquire). Writes of the thread that raises a flag, and writes that are
// visible to it (after a barrier, say), are visible to the thread that awaited the flag, and to its block after a
// barrier.
LLM_EXT_DEVICE void raise_flag(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
// Waits until the flag is at least `value`. The block that raises it must be resident.
LLM_EXT_DEVICE void await_flag(const uint32_t* flag, uint32_t value) {
  uint32_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
  } while (seen < value);
}

// Copies 16 bytes from global to shared memory, both aligned to 16 bytes, bypassing the L1 cache. The data is visible
// to the thread after copy_async_wait() and to its block after a subsequent barrier.
LLM_EXT_DEVICE void copy_async(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
LLM_EXT_DEVICE void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Prefetches 32 bytes around an address of global memory into the L2 cache. The address must be readable.
LLM_EXT_DEVICE void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// 16-bit types are computed in float.
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
// Rounds to a float whose low 13 mantissa bits are zero.
LLM_EXT_DEVICE float round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// float: the relative error of exp is below 2e-7 + 1e-7 |x| for finite x, that of the quotient 2 ulp. double: 1 ulp.
LLM_EXT_DEVICE float exp_of(float x) { return __expf(x); }
LLM_EXT_DEVICE double exp_of(double x) { return exp(x); }
LLM_EXT_DEVICE float quotient(float a, float b) { return __fdividef(a, b); }
LLM_EXT_DEVICE double quotient(double a, double b) { return a / b; }
LLM_EXT_DEVICE double tanh_of(double x) { return tanh(x); }
// float: 1 ulp, if x and the result are normal numbers.
LLM_EXT_DEVICE float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
LLM_EXT_DEVICE double reciprocal(double x) { return 1 / x; }
// At most 2 ulp.
LLM_EXT_DEVICE float exact_exp_of(float x) { return expf(x); }
LLM_EXT_DEVICE double exact_exp_of(double x) { return exp(x); }
LLM_EXT_DEVICE float log_of(float x) { return logf(x); }
LLM_EXT_DEVICE double log_of(double x) { return log(x); }

// Matrix fragments. Lane 4 r + q (r < 8, q < 4) holds these elements:
//   weights [16, 16]: columns 4 q, 4 q + 1 of row r, then of row r + 8; columns 4 q + 2, 4 q + 3 of row r, then of
//     row r + 8
//   states [8, 16]: columns 4 q to 4 q + 3 of row r
//   product [16, 8], weights times transposed states: (r, 2 q), (r, 2 q + 1), (r + 8, 2 q), (r + 8, 2 q + 1)
// These are the fragments of mma with permuted columns: the sum over columns has no order, and both operands use the
// same permutation. All lanes of the warp call this. Products are exact, sums are float. The statements are volatile:
// the compiler must not move an instruction of the whole warp to where only some lanes use its result.
LLM_EXT_DEVICE void multiply_add(float (&sum)[4], const Pack<uint32_t, 4>& weights, const Pack<uint32_t, 2>& states,
                                 BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(weights.at[0]), "r"(weights.at[1]), "r"(weights.at[2]), "r"(weights.at[3]), "r"(states.at[0]),
        "r"(states.at[1]));
}
LLM_EXT_DEVICE void multiply_add(float (&sum)[4], const Pack<uint32_t, 4>& weights, const Pack<uint32_t, 2>& states,
                                 Float16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(weights.at[0]), "r"(weights.at[1]), "r"(weights.at[2]), "r"(weights.at[3]), "r"(states.at[0]),
                 "r"(states.at[1]));
}
// TF32: operands are rounded by round_to_tf32. `first` holds columns 4 q and 4 q + 1, each of row r, then of row r + 8;
// `second` holds columns 4 q + 2 and 4 q + 3.
LLM_EXT_DEVICE void multiply_add_tf32(float (&sum)[4], const Pack<uint32_t, 4>& first, const Pack<uint32_t, 4>& second,
                                      const Pack<uint32_t, 4>& states) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Pack<uint32_t, 4>& weights = half == 0 ? first : second;
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(weights.at[0]), "r"(weights.at[1]), "r"(weights.at[2]), "r"(weights.at[3]), "r"(states.at[2 * half]),
          "r"(states.at[2 * half + 1]));
  }
}

struct LaunchShape {
  int64_t grid_x = 1, grid_y = 1, grid_z = 1;
  unsigned threads = 1;       // per block
  unsigned cluster = 1;       // blocks per cluster, along x; divides grid_x
  size_t shared_bytes = 0;    // per block
  bool all_resident = false;  // the launch fails unless all blocks can run at the same time

  // Whether the numbers of blocks are ones that a launch can have.
  bool is_valid() const {
    const auto at_most = [](int64_t blocks, int64_t most) { return blocks >= 1 && blocks <= most; };
    return at_most(grid_x, INT32_MAX) && at_most(grid_y, UINT16_MAX) && at_most(grid_z, UINT16_MAX);
  }
};

// Clears CUDA's last error, so that the next call does not report it.
inline int cleared(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// Raises limits of a kernel. The values are the same for every launch, so concurrent launches do not interfere.
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

// Queues the kernel and returns a cudaError_t.
template <typename Params>
int launch(void (*kernel)(Params), const LaunchShape& shape, const Params& params, void* stream) {
  const KernelLimits limits = {reinterpret_cast<const void*>(kernel)};
  cudaError_t error = shape.is_valid() ? cudaSuccess : cudaErrorInvalidConfiguration;
  if (error == cudaSuccess && shape.shared_bytes > 48 * 1024) error = limits.allow_all_shared_memory();
  if (error == cudaSuccess && shape.cluster > 8) error = limits.allow_large_clusters();
  if (error == cudaSuccess) {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(shape.grid_x), static_cast<unsigned>(shape.grid_y),
                          static_cast<unsigned>(shape.grid_z));
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
  return cleared(error);
}

// Queues a memset to 0.
inline int zero(void* memory, size_t bytes, void* stream) {
  return cleared(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)));
}

// Fills all members but resident_clusters.
inline int query_device(int device, DeviceFacts* facts) {
  int major = 0, minor = 0, shared = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&facts->sm_count, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  facts->sm = 10 * major + minor;
  facts->shared_bytes = shared;
  return cleared(error);
}

inline const char* error_text_of(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// The functions of stream_order.h.
inline int create_event(void** event) {
  return cleared(cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(event), cudaEventDisableTiming));
}
inline int queue_event(void* event, void* stream) {
  return cleared(cudaEventRecord(static_cast<cudaEvent_t>(event), static_cast<cudaStream_t>(stream)));
}
inline int queue_wait(void* event, void* stream) {
  return cleared(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(event), 0));
}
inline uint64_t captured_graph(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  cleared(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id));
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

// The number of clusters of this shape that run at the same time on the current device; 0 without clusters, or if the
// code that is loaded for the device was compiled for one without.
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
  cudaFuncAttributes attributes = {};
  cudaError_t error = cudaFuncGetAttributes(&attributes, limits.kernel);
  if (error == cudaSuccess && attributes.ptxVersion < 90) return 0;
  if (error == cudaSuccess) error = limits.allow_all_shared_memory();
  if (error == cudaSuccess) error = limits.allow_large_clusters();
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  return cleared(error) == 0 ? count : 0;
}

}  // namespace cuda
}  // namespace llm_ext
