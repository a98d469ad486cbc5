// CPU only: a padded batch with lengths as the rows of a packed sequence, which the CPU kernels read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "torch/alloc/empty.h"
#include "torch/dtypes.h"
#include "torch/stable.h"
#include "torch/tensor.h"
#include "torch/tensor_args.h"

namespace llm_ext {

// The rows of a batch [T, B, *] whose row b has lengths[b] steps, the longest row first. T is the type of the elements.
template <typename T>
class PackedLengths {
 public:
  PackedLengths(const char* op, const Tensor& lengths, int64_t steps, int64_t batch) : steps_(steps), batch_(batch) {
    const Input<int64_t> input(lengths, op, "lengths", {batch});
    check_lengths(lengths, op, "lengths", steps);
    const int64_t* length = input.get();
    order_.resize(batch);
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return length[a] > length[b]; });
    while (running_ < batch && length[order_[running_]] > 0) ++running_;
    const int64_t longest = running_ > 0 ? length[order_[0]] : 0;
    batch_sizes_ = empty({longest}, kScalarType<int64_t>);
    int64_t size = running_;
    for (int64_t t = 0; t < longest; ++t) {
      while (length[order_[size - 1]] <= t) --size;
      mutable_data<int64_t>(batch_sizes_)[t] = size;
      rows_ += size;
    }
  }

  const Tensor& batch_sizes() const { return batch_sizes_; }
  int64_t rows() const { return rows_; }

  // [T, B, K] to [rows, K].
  Tensor pack(const Tensor& padded) const {
    const Tensor from = dense(padded);
    const int64_t width = from.size(2);
    const Tensor packed = empty({rows_, width}, kScalarType<T>);
    T* to = mutable_data<T>(packed);
    for_each_row([&](int64_t t, int64_t b) {
      std::memcpy(to, data<T>(from) + (t * batch_ + b) * width, width * sizeof(T));
      to += width;
    });
    return packed;
  }

  // [rows, K] to [T, B, K], zeros beyond the lengths.
  Tensor pad(const Tensor& packed) const {
    const int64_t width = packed.size(1);
    const Tensor padded = empty({steps_, batch_, width}, kScalarType<T>);
    std::memset(mutable_data<T>(padded), 0, steps_ * batch_ * width * sizeof(T));
    const T* from = data<T>(packed);
    for_each_row([&](int64_t t, int64_t b) {
      std::memcpy(mutable_data<T>(padded) + (t * batch_ + b) * width, from, width * sizeof(T));
      from += width;
    });
    return padded;
  }

  // A state [B, K] or [1, B, K] to the rows that run, [R, K]; zeros if there is none.
  Tensor pack_state(const OptionalTensor& state, int64_t width) const {
    const Tensor packed = empty({running_, width}, kScalarType<T>);
    T* to = mutable_data<T>(packed);
    if (!state.has_value()) {
      std::memset(to, 0, running_ * width * sizeof(T));
      return packed;
    }
    const Tensor from = dense(*state);
    for (int64_t r = 0; r < running_; ++r) {
      std::memcpy(to + r * width, data<T>(from) + order_[r] * width, width * sizeof(T));
    }
    return packed;
  }

  // The rows that run, [R, K], into a state [B, K] or [1, B, K]; the others keep `idle`, or zeros if there is none.
  void pad_state(const Tensor& packed, const OptionalTensor& idle, const Tensor& state) const {
    const int64_t width = packed.size(1);
    T* to = mutable_data<T>(state);
    if (idle.has_value()) {
      const Tensor from = dense(*idle);
      std::memcpy(to, data<T>(from), batch_ * width * sizeof(T));
    } else {
      std::memset(to, 0, batch_ * width * sizeof(T));
    }
    for (int64_t r = 0; r < running_; ++r) {
      std::memcpy(to + order_[r] * width, data<T>(packed) + r * width, width * sizeof(T));
    }
  }

 private:
  template <typename Row>
  void for_each_row(Row row) const {
    const int64_t* sizes = data<int64_t>(batch_sizes_);
    for (int64_t t = 0; t < batch_sizes_.size(0); ++t) {
      for (int64_t r = 0; r < sizes[t]; ++r) row(t, order_[r]);
    }
  }

  int64_t steps_;
  int64_t batch_;
  std::vector<int64_t> order_;
  int64_t running_ = 0;  // R: rows with at least one step
  int64_t rows_ = 0;
  Tensor batch_sizes_;
};

}  // namespace llm_ext
