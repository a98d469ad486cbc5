// The recurrence for any size and type: float64, odd sizes, projections, and shapes without another plan.
//
// A block owns kRows batch rows for all steps, so blocks do not communicate. The limit is reading U from the L2 cache
// at every step: G H P numbers for kRows rows, about 2 x kRows operations per number. States pass from step to step in
// the block's part of the workspace, as Compute<S>. Forward, the lanes of a warp share a sum and read adjacent elements
// of a row of U; backward, a thread owns a sum and adjacent threads read adjacent elements of a row of U. The order of
// each sum is fixed.
#include "cuda/device.cuh"
#include "cuda/rnn/generic.h"
#include "cuda/rnn/launchers.h"
#include "cuda/rnn/steps.cuh"

namespace llm_ext {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = kGenericRows;

// The workspace of one block.
template <typename T>
struct ForwardScratch {
  T* h;  // [2, kRows, P] before and after the step, alternating
  T* c;  // [kRows, H] LSTM: the cell state
  T* m;  // [kRows, H] the state before its projection
};
template <typename T>
struct BackwardScratch {
  T* dz;     // [2, kRows, G H] the blocks of dz that depend on the state, of the next step and of this one, alternating
  T* dh;     // [kRows, P] with a projection: gradient of the state
  T* carry;  // [kRows, H]
};

template <typename Call>
struct GenericParams {
  Call call;
  int64_t scratch;  // elements of workspace per block
};

// The workspace of this block.
template <typename T, typename Call>
LLM_EXT_DEVICE T* scratch_of(const GenericParams<Call>& p) {
  return static_cast<T*>(p.call.workspace) + (static_cast<int64_t>(block_z()) * grid_x() + block_x()) * p.scratch;
}

template <typename T>
LLM_EXT_DEVICE ForwardScratch<T> forward_scratch(T* at, int64_t hidden, int64_t output) {
  return {at, at + 2 * kRows * output, at + kRows * (2 * output + hidden)};
}
template <typename T>
LLM_EXT_DEVICE BackwardScratch<T> backward_scratch(T* at, int gates, int64_t hidden, int64_t output) {
  T* dh = at + 2 * kRows * gates * hidden;
  return {at, dh, dh + kRows * output};
}

// Sums each sums[r] over the lanes; every lane gets the result.
template <typename T>
LLM_EXT_DEVICE void sum_over_lanes(T (&sums)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) sums[r] += shuffle_xor(sums[r], mask);
  }
}

// sums[lane_index()].
template <typename T>
LLM_EXT_DEVICE T own(const T (&sums)[kRows]) {
  T result = sums[0];
#pragma unroll
  for (int r = 1; r < kRows; ++r) result = lane_index() == r ? sums[r] : result;
  return result;
}

template <typename C, typename S>
LLM_EXT_KERNEL(kThreads)
void generic_forward(LLM_EXT_PARAMS GenericParams<RecurrenceForward<S>> p) {
  using T = Compute<S>;
  const RecurrenceShape& shape = p.call.shape;
  const ForwardDirection<S>& d = p.call.direction[block_z()];
  const C cell{shape.mode};
  const int64_t hidden = shape.hidden, output = shape.output;
  const bool projected = output != hidden;
  const ForwardScratch<T> scratch = forward_scratch(scratch_of<T>(p), hidden, output);

  int steps = 0;
#pragma unroll 1
  for (int r = 0; r < kRows; ++r) {
    const int64_t b = static_cast<int64_t>(block_x()) * kRows + r;
    const bool exists = b < shape.batch;
    const int length = exists ? length_of(shape, b) : 0;
    steps = length > steps ? length : steps;
    for (int64_t u = thread_index(); u < output; u += thread_count()) {
      const S h0 = exists && d.h0 != nullptr ? d.h0[b * output + u] : narrow<S>(T(0));
      scratch.h[r * output + u] = widen(h0);
      scratch.h[(kRows + r) * output + u] = T(0);
      if (exists && length == 0) d.h_n[b * output + u] = h0;
    }
    for (int64_t u = thread_index(); u < hidden; u += thread_count()) {
      const S c0 = exists && d.c0 != nullptr ? d.c0[b * hidden + u] : narrow<S>(T(0));
      scratch.c[r * hidden + u] = widen(c0);
      scratch.m[r * hidden + u] = T(0);
      if (C::kHasCell && exists && length == 0) d.c_n[b * hidden + u] = c0;
    }
    if (exists) clear_beyond(shape, b, length, d.y, d.y_stride, 0, output);
  }
  block_barrier();

  // Lane r of each warp runs the step of row r.
  const int row = lane_index();
  const int64_t b = static_cast<int64_t>(block_x()) * kRows + row;
  const int length = row < kRows && b < shape.batch ? length_of(shape, b) : 0;
  for (int s = 0; s < steps; ++s) {
    const T* h_now = scratch.h + s % 2 * (kRows * output);
    T* h_next = scratch.h + (s + 1) % 2 * (kRows * output);
    const bool active = s < length;
    const int64_t n = active ? sequence_row(shape, d.reverse, b, length, s) : 0;

    for (int64_t u = warp_index(); u < hidden; u += warp_count()) {
      T sums[C::kGates][kRows] = {};
      for (int64_t k = lane_index(); k < output; k += kWarpThreads) {
        T states[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) states[r] = h_now[r * output + k];
#pragma unroll
        for (int g = 0; g < C::kGates; ++g) {
          const T weight = widen(d.w_hh[(g * hidden + u) * output + k]);
#pragma unroll
          for (int r = 0; r < kRows; ++r) sums[g][r] += weight * states[r];
        }
      }
      T product[C::kGates][1];
#pragma unroll
      for (int g = 0; g < C::kGates; ++g) {
        sum_over_lanes(sums[g]);
        product[g][0] = own(sums[g]);
        if (d.b_hh != nullptr) product[g][0] += widen(d.b_hh[g * hidden + u]);
      }
      if (!active) continue;
      const int unit = static_cast<int>(u);
      ForwardStep<C, S, 1> step;
      step.load_at(shape, d, n, unit);
      const T h_before[1] = {C::kReadsState ? h_now[row * output + u] : T(0)};
      T c[1] = {scratch.c[row * hidden + u]};
      T h[1];
      T blocks[C::kBlocks][1];
      step.compute(cell, product, h_before, c, blocks, h);
      step.save(shape, d, n, unit, blocks, c, h);
      if constexpr (C::kHasCell) {
        scratch.c[row * hidden + u] = c[0];
        if (s == length - 1) d.c_n[b * hidden + u] = narrow<S>(c[0]);
      }
      if (projected) {
        scratch.m[row * hidden + u] = h[0];
      } else {
        h_next[row * output + u] = h[0];
        d.y[n * d.y_stride + u] = narrow<S>(h[0]);
        if (s == length - 1) d.h_n[b * output + u] = narrow<S>(h[0]);
      }
    }
    block_barrier();
    if (!projected) continue;

    for (int64_t k = warp_index(); k < output; k += warp_count()) {
      T sums[kRows] = {};
      for (int64_t u = lane_index(); u < hidden; u += kWarpThreads) {
        const T weight = widen(d.w_hr[k * hidden + u]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r] += weight * scratch.m[r * hidden + u];
      }
      sum_over_lanes(sums);
      if (!active) continue;
      const T h = own(sums);
      h_next[row * output + k] = h;
      d.y[n * d.y_stride + k] = narrow<S>(h);
      if (s == length - 1) d.h_n[b * output + k] = narrow<S>(h);
    }
    block_barrier();
  }
}

template <typename C, typename S>
LLM_EXT_KERNEL(kThreads)
void generic_backward(LLM_EXT_PARAMS GenericParams<RecurrenceBackward<S>> p) {
  using T = Compute<S>;
  const RecurrenceShape& shape = p.call.shape;
  const BackwardDirection<S>& d = p.call.direction[block_z()];
  const C cell{shape.mode};
  const int64_t hidden = shape.hidden, output = shape.output, width = C::kGates * hidden;
  const bool projected = output != hidden;
  const BackwardScratch<T> scratch = backward_scratch(scratch_of<T>(p), C::kGates, hidden, output);

  int steps = 0;
  int length[kRows];  // 0 for rows beyond the batch
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t b = static_cast<int64_t>(block_x()) * kRows + r;
    const bool exists = b < shape.batch;
    length[r] = exists ? length_of(shape, b) : 0;
    steps = length[r] > steps ? length[r] : steps;
    for (int64_t k = thread_index(); k < width; k += thread_count()) {
      scratch.dz[r * width + k] = T(0);
      scratch.dz[(kRows + r) * width + k] = T(0);
    }
    for (int64_t u = thread_index(); u < output; u += thread_count()) scratch.dh[r * output + u] = T(0);
    for (int64_t u = thread_index(); u < hidden; u += thread_count()) {
      const bool given = C::kHasCell && exists && d.grad_c_n != nullptr;
      scratch.carry[r * hidden + u] = given ? widen(d.grad_c_n[b * hidden + u]) : T(0);
    }
    if (exists) {
      clear_beyond(shape, b, length[r], d.dz, C::kBlocks * hidden, 0, C::kBlocks * hidden);
      if (projected) clear_beyond(shape, b, length[r], d.dh, output, 0, output);
    }
  }
  block_barrier();

  // From the last step to the first, then s = -1 for the gradients of the initial state.
  for (int s = steps - 1; s >= -1; --s) {
    const T* dz_after = scratch.dz + (s + 2) % 2 * (kRows * width);
    T* dz_now = scratch.dz + (s + 1) % 2 * (kRows * width);

    // Runs the step of row r and unit u, given the gradient of the state before its projection.
    const auto step_of = [&](int r, int64_t u, T gradient) {
      const int64_t b = static_cast<int64_t>(block_x()) * kRows + r;
      const int64_t n = sequence_row(shape, d.reverse, b, length[r], s);
      const int unit = static_cast<int>(u);
      BackwardStep<C, S, 1> step;
      step.load_at(shape, d, b, length[r], s, n, unit);
      const T dh[1] = {gradient};
      T carry[1] = {scratch.carry[r * hidden + u]};
      T dz[C::kBlocks][1];
      step.compute(cell, dh, carry, dz);
      step.write(shape, d, n, unit, dz);
      scratch.carry[r * hidden + u] = carry[0];
#pragma unroll
      for (int g = 0; g < C::kGates; ++g) dz_now[r * width + g * hidden + u] = dz[C::kBlocks - C::kGates + g][0];
    };

    for (int64_t k = thread_index(); k < output; k += thread_count()) {
      T sums[kRows] = {};
      for (int64_t i = 0; i < width; ++i) {
        const T weight = widen(d.w_hh[i * output + k]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r] += weight * dz_after[r * width + i];
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t b = static_cast<int64_t>(block_x()) * kRows + r;
        if (b >= shape.batch || s >= length[r]) continue;
        T dh = sums[r];
        // grad_h_n is added at a row's last step; for a row of length 0 it becomes the gradient of the initial state.
        if (s == length[r] - 1 && d.grad_h_n != nullptr) dh += widen(d.grad_h_n[b * output + k]);
        if (s < 0) {
          if (C::kCarries && !C::kHasCell) dh += scratch.carry[r * hidden + k];
          if (d.dh0 != nullptr) d.dh0[b * output + k] = narrow<S>(dh);
          continue;
        }
        const int64_t n = sequence_row(shape, d.reverse, b, length[r], s);
        if (d.grad_y != nullptr) dh += widen(d.grad_y[n * d.grad_y_stride + k]);
        if (projected) {
          scratch.dh[r * output + k] = dh;
          d.dh[n * output + k] = narrow<S>(dh);
        } else {
          step_of(r, k, dh);
        }
      }
    }
    block_barrier();
    if (!projected || s < 0) continue;

    for (int64_t u = thread_index(); u < hidden; u += thread_count()) {
      T sums[kRows] = {};
      for (int64_t k = 0; k < output; ++k) {
        const T weight = widen(d.w_hr[k * hidden + u]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r] += weight * scratch.dh[r * output + k];
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (s < length[r]) step_of(r, u, sums[r]);
      }
    }
    block_barrier();
  }

  if (C::kHasCell && d.dc0 != nullptr) {
    for (int r = 0; r < kRows; ++r) {
      const int64_t b = static_cast<int64_t>(block_x()) * kRows + r;
      if (b >= shape.batch) break;
      for (int64_t u = thread_index(); u < hidden; u += thread_count()) {
        d.dc0[b * hidden + u] = narrow<S>(scratch.carry[r * hidden + u]);
      }
    }
  }
}

template <typename Call>
int run(void (*kernel)(GenericParams<Call>), const Call& call, int64_t scratch, void* stream) {
  LaunchShape shape;
  shape.grid_x = (call.shape.batch + kRows - 1) / kRows;
  shape.grid_z = call.shape.directions;
  shape.threads = kThreads;
  return launch(kernel, shape, GenericParams<Call>{call, scratch}, stream);
}

}  // namespace

template <typename S>
int generic_recurrence(const RecurrenceForward<S>& call, void* stream) {
  return with_cell(call.shape.mode, [&](auto cell) {
    const int64_t scratch = generic_forward_scratch(call.shape.hidden, call.shape.output);
    return run(&generic_forward<decltype(cell), S>, call, scratch, stream);
  });
}

template <typename S>
int generic_recurrence(const RecurrenceBackward<S>& call, void* stream) {
  return with_cell(call.shape.mode, [&](auto cell) {
    const int64_t scratch = generic_backward_scratch(cell.kGates, call.shape.hidden, call.shape.output);
    return run(&generic_backward<decltype(cell), S>, call, scratch, stream);
  });
}

template int generic_recurrence(const RecurrenceForward<float>&, void*);
template int generic_recurrence(const RecurrenceForward<double>&, void*);
template int generic_recurrence(const RecurrenceForward<BFloat16>&, void*);
template int generic_recurrence(const RecurrenceForward<Float16>&, void*);
template int generic_recurrence(const RecurrenceBackward<float>&, void*);
template int generic_recurrence(const RecurrenceBackward<double>&, void*);
template int generic_recurrence(const RecurrenceBackward<BFloat16>&, void*);
template int generic_recurrence(const RecurrenceBackward<Float16>&, void*);

}  // namespace cuda
}  // namespace llm_ext
