// Matrices as views of CUDA tensors, and their products by torch, hence by cuBLAS.
#pragma once

#include <cstdint>

#include "torch/stable.h"
#include "torch/tensor.h"

namespace llm_ext {

struct MatrixStrides {
  int64_t row, column;
};

// The view starts `offset` elements into t.
inline Tensor matrix(const Tensor& t, int64_t rows, int64_t columns, MatrixStrides strides, int64_t offset = 0) {
  const int64_t sizes[] = {rows, columns}, steps[] = {strides.row, strides.column};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, steps, offset, &handle));
  return Tensor(handle);
}
inline Tensor matrix(const Tensor& t, int64_t rows, int64_t columns) { return matrix(t, rows, columns, {columns, 1}); }
inline Tensor transposed(const Tensor& m) { return matrix(m, m.size(1), m.size(0), {m.stride(1), m.stride(0)}); }
inline Tensor rows_of(const Tensor& m, int64_t begin, int64_t rows) {
  return matrix(m, rows, m.size(1), {m.stride(0), m.stride(1)}, begin * m.stride(0));
}
inline Tensor columns_of(const Tensor& m, int64_t begin, int64_t columns) {
  return matrix(m, m.size(0), columns, {m.stride(0), m.stride(1)}, begin * m.stride(1));
}

// out = a b.
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
}
// out = a b + c; c may be a row, which is broadcast, or `out`.
inline void multiply_add(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& c) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), c.get(), a.get(), b.get(), 1, 1));
}

inline void zero(Tensor t) { torch::stable::zero_(t); }
inline void copy(Tensor to, const Tensor& from) { torch::stable::copy_(to, from); }

}  // namespace llm_ext
