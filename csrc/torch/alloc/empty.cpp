#include "torch/alloc/empty.h"

#include <vector>

#include "torch/alloc/cpu_caching_allocator.h"

namespace llm_ext {
namespace {

struct DtypeInfo {
  int32_t code;  // as torch's C shim numbers the dtypes
  int64_t bytes;
};

DtypeInfo dtype_info(ScalarType dtype) {
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
    case ScalarType::Float:
      return {aoti_torch_dtype_float32(), 4};
    default:
      STD_TORCH_CHECK(false, "llm_ext: no result has this dtype");
  }
}

// A tensor whose memory returns to the CPU caching allocator. False: out of memory.
bool empty_from_cache(const int64_t* sizes, const int64_t* strides, int64_t dim, int32_t dtype, int64_t bytes,
                      AtenTensorHandle* handle) {
  const Block block = cpu_caching_allocator().allocate(bytes);
  if (block.data == nullptr) return false;
  const auto deleter = [](void* data, void* size) {
    cpu_caching_allocator().free({data, static_cast<int64_t>(reinterpret_cast<intptr_t>(size))});
  };
  void* const size = reinterpret_cast<void*>(static_cast<intptr_t>(block.bytes));
  constexpr int32_t kNoIndex = -1;  // torch's CPU device has no index
  const bool ok = torch_from_blob(block.data, dim, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), kNoIndex,
                                  handle, aoti_torch_layout_strided(), nullptr, 0, deleter, size) == TORCH_SUCCESS;
  if (!ok) deleter(block.data, size);
  return ok;
}

}  // namespace

Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType dtype,
                     const Device& device) {
  AtenTensorHandle handle;
  auto [code, bytes] = dtype_info(dtype);
  bool has_elements = true, fits = true;
  for (int64_t i = 0; i < dim; ++i) {
    has_elements = has_elements && sizes[i] > 0;
    fits = fits && multiply(&bytes, sizes[i]);
  }
  STD_TORCH_CHECK(fits, "llm_ext: out of memory: the sizes of a result are too large");
  if (!has_elements) bytes = 0;
  const bool cached = device.is_cpu() && bytes >= CpuCachingAllocator::kMinBytes;
  const bool ok =
      cached ? empty_from_cache(sizes, strides, dim, code, bytes, &handle)
             : aoti_torch_empty_strided(dim, sizes, strides, code, device.type, device.index, &handle) == TORCH_SUCCESS;
  // The C shim reports a failure without its reason.
  STD_TORCH_CHECK(ok, "llm_ext: out of memory: cannot allocate ", bytes, " bytes on ", device.text());
  return Tensor(handle);
}

Tensor empty(const int64_t* sizes, int64_t dim, ScalarType dtype, const Device& device) {
  std::vector<int64_t> strides(dim);  // torch has no limit to the number of dimensions
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    STD_TORCH_CHECK(multiply(&stride, sizes[i]), "llm_ext: out of memory: the sizes of a result are too large");
  }
  return empty_strided(sizes, strides.data(), dim, dtype, device);
}

}  // namespace llm_ext
