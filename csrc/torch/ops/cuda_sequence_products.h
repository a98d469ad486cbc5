// The products of a backward pass over all rows of a sequence: gradients of x, weights and biases, by torch's products.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/rnn/launchers.h"
#include "cuda/rnn/shift_rows.h"
#include "torch/alloc/empty.h"
#include "torch/ops/cuda_device.h"
#include "torch/ops/cuda_matrix.h"
#include "torch/ops/rnn.h"

namespace llm_ext {

// The products of one direction. dz [N, blocks H] are the gradients of its pre-activations.
template <typename S>
class SequenceProducts {
 public:
  SequenceProducts(const char* op, const CheckedRnnArguments<S>& r, const cuda::RecurrenceShape& shape, void* stream)
      : op_(op), r_(r), shape_(shape), stream_(stream) {}

  // dx = dz W, or dx += dz W.
  void input_gradient(const Tensor& dz, const Tensor& dx, bool add) const {
    Tensor w_ih = matrix(r_.w_ih_tensor(), r_.gates(), sizes().input);
    if (sizes().mode == Mode::kGru) {
      // W in the order of dz: one product is faster than two.
      const Tensor ordered = new_matrix(w_ih.size(0), w_ih.size(1));
      for (const RowRange& p : input_ranges()) copy(rows_of(ordered, p.column, p.rows), rows_of(w_ih, p.row, p.rows));
      w_ih = ordered;
    }
    const Tensor dz_input = columns_of(dz, 0, w_ih.size(0));
    add ? multiply_add(dx, dz_input, w_ih, dx) : multiply(dx, dz_input, w_ih);
  }

  // dW = dzᵀ x, where x has no padding.
  void input_weight_gradient(const Tensor& dz, const Tensor& x, const Tensor& dw_ih) const {
    for (const RowRange& p : input_ranges()) {
      multiply(rows_of(dw_ih, p.row, p.rows), transposed(columns_of(dz, p.column, p.rows)), x);
    }
  }

  // dU = dzᵀ h, where h is the state before each step; y are the states after.
  void state_weight_gradient(const Tensor& dz, const Tensor& y, const Tensor& dw_hh) const {
    const RecurrenceSizes& s = sizes();
    const Tensor dz_state = state_columns(dz);
    const bool ends_vary = r_.packed() || r_.lengths() != nullptr;
    if (ends_vary) {
      multiply(dw_hh, transposed(dz_state), shifted(y, s.reverse ? 1 : -1, r_.h0()));
      return;
    }
    // All steps but the first find their states in y, one step away.
    const int64_t B = s.batch, rest = r_.rows() - B;
    const Tensor later = rows_of(dz_state, s.reverse ? 0 : B, rest), states = rows_of(y, s.reverse ? B : 0, rest);
    const Tensor first = rows_of(dz_state, s.reverse ? rest : 0, B);
    multiply(dw_hh, transposed(later), states);
    if (r_.h0() != nullptr) multiply_add(dw_hh, transposed(first), matrix(*r_.h0_tensor(), B, s.output), dw_hh);
  }

  void bias_gradients(const Tensor& dz, const RnnBackwardArguments& need, const RnnBackwardResults& out) const {
    const int64_t dimension = 0;
    const Tensor sums = torch::stable::sum(dz, torch::headeronly::IntHeaderOnlyArrayRef(&dimension, 1));
    const Tensor row = matrix(sums, 1, blocks());
    const int64_t gates = r_.gates();
    if (need.need_db_hh) copy(matrix(out.db_hh, 1, gates), state_columns(row));
    if (!need.need_db_ih) return;
    for (const RowRange& p : input_ranges()) {
      copy(columns_of(matrix(out.db_ih, 1, gates), p.row, p.rows), columns_of(row, p.column, p.rows));
    }
  }

  // Zeroes padding, which may hold NaN: its gradients are 0, and 0 times NaN is NaN.
  Tensor without_padding(const Tensor& m) const {
    if (r_.lengths() == nullptr) return m;
    return shifted(m, 0, nullptr);
  }

 private:
  const RecurrenceSizes& sizes() const { return r_.sizes(); }
  int64_t blocks() const { return blocks_of(sizes().mode) * sizes().hidden; }
  Tensor new_matrix(int64_t rows, int64_t columns) const {
    return llm_ext::empty({rows, columns}, kScalarType<S>, r_.device());
  }

  // Columns of dz that are the gradients of rows of W and b_ih. The GRU's blocks n r z belong to the rows r z n.
  struct RowRange {
    int64_t column, row, rows;
  };
  std::vector<RowRange> input_ranges() const {
    const int64_t H = sizes().hidden;
    if (sizes().mode == Mode::kGru) return {{H, 0, 2 * H}, {0, 2 * H, H}};
    return {{0, 0, blocks()}};
  }
  // The columns of dz for U and b_hh: the last blocks, in the order of their rows.
  Tensor state_columns(const Tensor& dz) const { return columns_of(dz, blocks() - r_.gates(), r_.gates()); }

  // The rows of m `shift` steps away, without padding; `first` are the rows that have no such step, null: zeros.
  Tensor shifted(const Tensor& m, int shift, const S* first) const {
    constexpr int64_t kBytes = sizeof(S);
    Tensor to = new_matrix(m.size(0), m.size(1));
    if (m.numel() == 0) return to;
    const cuda::RowShift call = {shape_.steps, shape_.batch,       shape_.lengths, shape_.row_offsets,
                                 shift,        m.size(1) * kBytes, m.data_ptr(),   m.stride(0) * kBytes,
                                 first,        to.data_ptr()};
    check_queued(op_, cuda::shift_rows(call, stream_));
    return to;
  }

  const char* const op_;
  const CheckedRnnArguments<S>& r_;
  const cuda::RecurrenceShape shape_;
  void* const stream_;
};

}  // namespace llm_ext
