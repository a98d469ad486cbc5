// What stands between a tensor and a kernel: checks of everything that could corrupt memory, allocation, and the team.
// What arguments mean is checked in llm_ext/checks.py, with better messages.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "cpu/kernels.h"
#include "torch/threads/usable_cores.h"
#include "torch/alloc/cpu_caching_allocator.h"
#include "torch/stable.h"

namespace llm_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// How torch calls a type that tensors are stored as.
template <typename S>
constexpr ScalarType kScalarType = ScalarType::Float;
template <>
inline constexpr ScalarType kScalarType<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kScalarType<BFloat16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType kScalarType<Float16> = ScalarType::Half;

inline bool has_sizes(const Tensor& t, std::initializer_list<int64_t> sizes) {
  if (t.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t i = 0;
  for (int64_t size : sizes) {
    if (t.size(i++) != size) return false;
  }
  return true;
}

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

// Where tensors lie: a type of device, as the C interface of torch numbers it, and which one of them.
struct Place {
  int32_t type = aoti_torch_device_type_cpu();
  int32_t index = 0;

  bool is_cpu() const { return type == aoti_torch_device_type_cpu(); }
  bool holds(const Tensor& t) const { return is_cpu() ? t.is_cpu() : t.is_cuda() && t.get_device_index() == index; }
  std::string text() const { return is_cpu() ? "cpu" : "cuda:" + std::to_string(index); }
};

inline Place place_of(const Tensor& t) {
  if (t.is_cpu()) return {};
  STD_TORCH_CHECK(t.is_cuda(), "llm_ext: no kernels for this type of device");
  return {aoti_torch_device_type_cuda(), t.get_device_index()};
}

// Shape, dtype and device of one argument.
inline void check_tensor(const Tensor& t, const char* op, const char* name, ScalarType dtype,
                         std::initializer_list<int64_t> sizes, const Place& place = {}) {
  STD_TORCH_CHECK(place.holds(t), op, ": ", name, " must be on ", place.text());
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must have the dtype of the others");
  if (!has_sizes(t, sizes)) {
    std::string expected;
    for (int64_t size : sizes) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
    STD_TORCH_CHECK(false, op, ": ", name, " must be [", expected, "], got ", shape_text(t));
  }
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
// Dense, and as the kernels of a GPU want it: to be read 16 bytes at a time.
inline Tensor aligned(const Tensor& t) {
  const Tensor d = dense(t);
  return reinterpret_cast<uintptr_t>(d.data_ptr()) % 16 == 0 ? d : torch::stable::clone(d);
}

// Never null, not even for a tensor without elements: to a kernel null means that the tensor is not there.
template <typename T>
T* mutable_data(const Tensor& t) {
  alignas(64) static T none[1];
  T* p = static_cast<T*>(t.data_ptr());
  return p != nullptr ? p : none;
}
template <typename T>
const T* data(const Tensor& t) {
  return mutable_data<T>(t);
}

// An optional input, checked and made dense; keeps the dense copy alive for the call.
template <typename T>
class Input {
 public:
  Input(const OptionalTensor& t, const char* op, const char* name, std::initializer_list<int64_t> sizes,
        ScalarType dtype = kScalarType<T>, const Place& place = {}) {
    if (!t.has_value()) return;
    check_tensor(*t, op, name, dtype, sizes, place);
    tensor_ = place.is_cpu() ? dense(*t) : aligned(*t);
  }
  const OptionalTensor& tensor() const { return tensor_; }
  const T* get() const { return tensor_.has_value() ? data<T>(*tensor_) : nullptr; }

 private:
  OptionalTensor tensor_;
};

// As the C interface of torch numbers it, and bytes of an element.
struct TypeCode {
  int32_t code;
  int64_t bytes;
};
inline TypeCode type_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return {aoti_torch_dtype_float64(), 8};
    case ScalarType::BFloat16:
      return {aoti_torch_dtype_bfloat16(), 2};
    case ScalarType::Half:
      return {aoti_torch_dtype_float16(), 2};
    case ScalarType::Byte:
      return {aoti_torch_dtype_uint8(), 1};
    case ScalarType::Long:
      return {aoti_torch_dtype_int64(), 8};
    default:
      return {aoti_torch_dtype_float32(), 4};
  }
}

// A tensor on the CPU whose memory goes back to cpu_caching_allocator(). False: there is no memory.
inline bool empty_large(const int64_t* sizes, const int64_t* strides, int64_t dimensions, int32_t dtype, int64_t bytes,
                        AtenTensorHandle* handle) {
  const Block block = cpu_caching_allocator().take(bytes);
  if (block.data == nullptr) return false;
  const auto give_back = [](void* data, void* size) {
    cpu_caching_allocator().give_back({data, static_cast<int64_t>(reinterpret_cast<intptr_t>(size))});
  };
  void* const size = reinterpret_cast<void*>(static_cast<intptr_t>(block.bytes));
  constexpr int32_t kNoIndex = -1;  // as memory of the CPU is known to torch
  const bool got =
      torch_from_blob(block.data, dimensions, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), kNoIndex, handle,
                      aoti_torch_layout_strided(), nullptr, 0, give_back, size) == TORCH_SUCCESS;
  if (!got) give_back(block.data, size);
  return got;
}

inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dimensions, ScalarType dtype,
                            const Place& place = {}) {
  AtenTensorHandle handle;
  auto [code, bytes] = type_code(dtype);
  for (int64_t i = 0; i < dimensions; ++i) bytes *= sizes[i];  // all of our layouts are dense
  const bool large = place.is_cpu() && bytes >= CpuCachingAllocator::kLeastBytes;
  const bool got = large ? empty_large(sizes, strides, dimensions, code, bytes, &handle)
                         : aoti_torch_empty_strided(dimensions, sizes, strides, code, place.type, place.index,
                                                    &handle) == TORCH_SUCCESS;
  // The C interface of torch says that it failed, not why.
  STD_TORCH_CHECK(got, "llm_ext: out of memory: no ", bytes, " bytes to be had on ", place.text());
  return Tensor(handle);
}

inline Tensor empty_strided(std::initializer_list<int64_t> sizes, const int64_t* strides, ScalarType dtype,
                            const Place& place = {}) {
  return empty_strided(sizes.begin(), strides, static_cast<int64_t>(sizes.size()), dtype, place);
}

inline Tensor empty(const int64_t* sizes, int64_t dimensions, ScalarType dtype, const Place& place = {}) {
  constexpr int64_t kMostDimensions = 64;  // as torch
  int64_t strides[kMostDimensions];
  int64_t stride = 1;
  for (int64_t i = dimensions - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return empty_strided(sizes, strides, dimensions, dtype, place);
}
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Place& place = {}) {
  return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype, place);
}

// An output that the caller may not want: then it is empty and the kernel gets null.
template <typename T>
class Output {
 public:
  Output(bool wanted, std::initializer_list<int64_t> sizes, const Place& place = {})
      : wanted_(wanted), tensor_(wanted ? empty(sizes, kScalarType<T>, place) : empty({0}, kScalarType<T>, place)) {}
  T* get() const { return wanted_ ? mutable_data<T>(tensor_) : nullptr; }
  const Tensor& tensor() const { return tensor_; }

 private:
  bool wanted_;
  Tensor tensor_;
};

// Of so many elements; null if there are none.
template <typename S>
OptionalTensor workspace_of(int64_t elements) {
  if (elements == 0) return std::nullopt;
  return empty({elements}, kScalarType<Compute<S>>);
}

inline int max_threads() {
#ifdef _OPENMP
  return static_cast<int>(torch::stable::get_num_threads());
#else
  return 1;
#endif
}

// A team has no use for threads without a core: at each barrier the others would wait until the system gives them one.
inline int team_size(int wanted) {
  if (wanted <= 1) return 1;
  const int cores = usable_cores();
  return cores > 0 && cores < wanted ? cores : wanted;
}

// Runs kernel(team) on at most `threads` threads of torch's own pool, and returns when all have finished. A barrier
// needs threads that are known to run, so the team has the size that came, not the size that was asked for.
//
// All threads of the pool are called, as torch calls them, and those beyond the team go home at once: GCC's OpenMP ends
// the threads that a smaller team leaves out, and the next op of torch would have to start them again.
template <typename Kernel>
void run_team(int threads, const Kernel& kernel) {
  Barrier barrier;
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(max_threads())
    {
      const int size = threads < omp_get_num_threads() ? threads : omp_get_num_threads();
      const int rank = omp_get_thread_num();
      if (rank < size) kernel(ThreadTeam{rank, size, &barrier});
    }
    return;
  }
#endif
  (void)threads;
  kernel(ThreadTeam{0, 1, &barrier});
}

// Calls run(S{}) with that one of the types which a tensor is stored as.
template <typename First, typename... Others, typename Run>
auto with_type(const Tensor& t, const char* op, const char* name, const Run& run) {
  const ScalarType dtype = t.scalar_type();
  if constexpr (sizeof...(Others) > 0) {
    if (dtype != kScalarType<First>) return with_type<Others...>(t, op, name, run);
  }
  STD_TORCH_CHECK(dtype == kScalarType<First>, op, ": ", name, " must not be of this dtype");
  return run(First{});
}

}  // namespace llm_ext
