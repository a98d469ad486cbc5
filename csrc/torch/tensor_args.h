// Checks of everything that could corrupt memory, and the tensors that pass them. llm_ext/ops/argument_checks.py
// explains a failure with better messages.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "torch/alloc/empty.h"
#include "torch/device.h"
#include "torch/dtypes.h"
#include "torch/tensor.h"

namespace llm_ext {

// The sizes of a tensor that has no elements may be anything. If their product, with 1 in place of 0, is at most this,
// then no index, number of bytes or size of a workspace that is computed from them overflows.
constexpr int64_t kMaxVolume = int64_t{1} << 48;

// For tensors of any number of dimensions.
inline void check_volume(const Tensor& t, const char* op, const char* name) {
  int64_t volume = 1;
  bool fits = true;
  for (int64_t i = 0; i < t.dim(); ++i) fits = fits && multiply(&volume, t.size(i));
  STD_TORCH_CHECK(fits && volume <= kMaxVolume, op, ": ", name, " has too large sizes, ", shape_text(t));
}

// Checks device, dtype and shape.
inline void check_tensor(const Tensor& t, const char* op, const char* name, ScalarType dtype,
                         std::initializer_list<int64_t> sizes, const Device& device = {}) {
  STD_TORCH_CHECK(device.holds(t), op, ": ", name, " must be on ", device.text());
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must have the dtype of the others");
  if (!has_sizes(t, sizes)) {
    std::string expected;
    for (int64_t size : sizes) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
    STD_TORCH_CHECK(false, op, ": ", name, " must be [", expected, "], got ", shape_text(t));
  }
  int64_t volume = 1;
  bool fits = true;
  for (int64_t size : sizes) fits = fits && multiply(&volume, size);
  STD_TORCH_CHECK(fits && volume <= kMaxVolume, op, ": ", name, " has too large sizes, ", shape_text(t));
}

// An optional input, checked at once, and made dense when it is first read: an expanded tensor is a large view of
// little memory, and all checks of a call come before its copies. Owns the dense copy for the duration of the call. The
// first read must not be in a parallel region.
template <typename T>
class Input {
 public:
  Input(const OptionalTensor& t, const char* op, const char* name, std::initializer_list<int64_t> sizes,
        const Device& device = {})
      : tensor_(t), on_cpu_(device.is_cpu()) {
    if (t.has_value()) check_tensor(*t, op, name, kScalarType<T>, sizes, device);
  }
  const OptionalTensor& tensor() const {
    if (!dense_ && tensor_.has_value()) tensor_ = on_cpu_ ? dense(*tensor_) : aligned(*tensor_);
    dense_ = true;
    return tensor_;
  }
  const T* get() const { return tensor().has_value() ? data<T>(*tensor_) : nullptr; }

 private:
  mutable OptionalTensor tensor_;
  mutable bool dense_ = false;
  bool on_cpu_;
};

// How many indices of a dimension to read for all its numbers: an expanded one repeats the first.
inline int64_t distinct(const Tensor& t, int64_t dim) {
  return t.stride(dim) == 0 && t.size(dim) > 1 ? 1 : t.size(dim);
}

// The numbers of a vector on the CPU, which is not copied: it may be a large view of little memory.
class Numbers {
 public:
  explicit Numbers(const Tensor& t) : first_(data<int64_t>(t)), stride_(t.stride(0)) {}
  int64_t operator[](int64_t i) const { return first_[i * stride_]; }

 private:
  const int64_t* first_;
  int64_t stride_;
};

// Checks that every length is from 0 to `most`. Lengths on a GPU are not read here: its kernels clamp them.
inline void check_lengths(const Tensor& lengths, const char* op, const char* name, int64_t most) {
  if (!lengths.is_cpu()) return;
  const Numbers length(lengths);
  for (int64_t b = 0; b < distinct(lengths, 0); ++b) {
    STD_TORCH_CHECK(length[b] >= 0 && length[b] <= most, op, ": ", name, " must be from 0 to ", most, ", got ",
                    length[b], " in row ", b);
  }
}

// An output. If the caller does not want it, the tensor has no elements and the kernel gets null.
template <typename T>
class Output {
 public:
  Output(bool wanted, std::initializer_list<int64_t> sizes, const Device& device = {})
      : wanted_(wanted), tensor_(wanted ? empty(sizes, kScalarType<T>, device) : empty({0}, kScalarType<T>, device)) {}
  T* get() const { return wanted_ ? mutable_data<T>(tensor_) : nullptr; }
  const Tensor& tensor() const { return tensor_; }

 private:
  bool wanted_;
  Tensor tensor_;
};

}  // namespace llm_ext
