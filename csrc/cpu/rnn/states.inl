// The states between steps, and one step of a vector of units.
#pragma once

#include "cpu/gemm/blocking.inl"
#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"
#include "cpu/rnn/steps.inl"
#include "cpu/simd/float16.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/traits.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

template <typename From, typename To>
static inline void copy_columns(const From* from, To* to, int64_t width, Range rows, Range columns) {
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    convert(from + r * width + columns.begin, to + r * width + columns.begin, columns.size());
  }
}

// copy_columns, or zeros if `from` is null.
template <typename From, typename To>
static inline void start_columns(const From* from, To* to, int64_t width, Range rows, Range columns) {
  if (from != nullptr) return copy_columns(from, to, width, rows, columns);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    __builtin_memset(to + r * width + columns.begin, 0, columns.size() * sizeof(To));
  }
}

// One step of up to a vector of units of one row. `blocks` holds their pre-activations; the pointers are at the first
// unit. h_before may be null: zeros. saved may be null: not needed; its blocks are `hidden` apart. Returns the output.
template <typename S, typename C, typename T = Compute<S>>
static inline Vec<T> forward_units(Vec<T> (&blocks)[C::kBlocks], const T* h_before, T* c, S* saved, int64_t hidden,
                                   int lanes) {
  Vec<T> before{}, cell{};
  if (C::kReadsState && h_before != nullptr) before = load_partial(h_before, lanes);
  if (C::kHasCell) cell = load_partial(c, lanes);
  const Vec<T> h = C::template forward<T>(blocks, before, cell);
  if (C::kHasCell) store_partial(c, cell, lanes);
  if (C::kSavesBlocks && saved != nullptr) {
    for (int b = 0; b < C::kBlocks; ++b) store_partial(saved + b * hidden, blocks[b], lanes);
    if (C::kHasCell) store_partial(saved + C::kBlocks * hidden, cell, lanes);
  }
  return h;
}

// The states as they pass from step to step, as T: h in y and c in c_n, or in workspace if S is narrower than T; y and
// c_n then get rounded copies.
template <typename S, typename C>
class States {
  using T = Compute<S>;

 public:
  States(const RecurrenceForwardParams<S>& p, T* two_steps, T* cells) : p_(p), two_steps_(two_steps) {
    if constexpr (kIsNarrow<S>) {
      cells_ = cells;
    } else {
      cells_ = p.c_n;
    }
  }

  // Before the first step. The two-step buffer gets h0 twice, since a row may join at any step.
  void start(Range rows, Range columns, Range output_columns) const {
    if (C::kHasCell && static_cast<const void*>(p_.c0) != cells_) {
      start_columns(p_.c0, cells_, s_.hidden, rows, columns);
    }
    if constexpr (kIsNarrow<S>) {
      if (p_.h0 == nullptr) return;
      for (int i = 0; i < 2; ++i) {
        copy_columns(p_.h0, two_steps_ + i * s_.batch * s_.output, s_.output, rows, output_columns);
      }
    }
  }

  // The state of row r before position i; null: zeros. The states of the following rows are P apart, as long as all of
  // them continue or all join.
  const T* before(int64_t i, int64_t r) const {
    if constexpr (kIsNarrow<S>) {
      return r >= order_.rows(i - 1) && p_.h0 == nullptr ? nullptr : step_buffer(i + 1, r);
    } else {
      return stored_before(i, r);
    }
  }

  // The same, as the left factor of products.
  const Factor<S>* factor_before(int64_t i, int64_t r) const {
    if constexpr (kSame<Factor<S>, S>) {
      return stored_before(i, r);
    } else {
      return before(i, r);
    }
  }

  T* cell(int64_t r, int64_t col) const { return C::kHasCell ? cells_ + r * s_.hidden + col : nullptr; }

  // Where the states of a position are stored: in y, and for the next step.
  struct Target {
    S* y;
    T* next;
    int64_t width;

    void store(int64_t r, int64_t col, Vec<T> h, int lanes) const {
      store_partial(y + r * width + col, h, lanes);
      if constexpr (kIsNarrow<S>) store_partial(next + r * width + col, h, lanes);
    }
  };
  Target target(int64_t i) const { return {p_.y + order_.first_row(i) * s_.output, step_buffer(i, 0), s_.output}; }

  // After position i: copies the states of rows that end there to h_n.
  void end(int64_t i, Range rows, Range output_columns) const {
    copy_columns(p_.y + order_.first_row(i) * s_.output, p_.h_n, s_.output,
                 intersect(rows, {order_.rows(i + 1), order_.rows(i)}), output_columns);
  }

  // After the last step.
  void finish(Range rows, Range columns) const {
    if constexpr (kIsNarrow<S>) {
      if (C::kHasCell) copy_columns(cells_, p_.c_n, s_.hidden, rows, columns);
    }
  }

 private:
  const S* stored_before(int64_t i, int64_t r) const {
    if (r < order_.rows(i - 1)) return p_.y + (order_.first_row(i - 1) + r) * s_.output;
    return p_.h0 == nullptr ? nullptr : p_.h0 + r * s_.output;
  }

  // The state of row r after position i in the two-step buffer.
  T* step_buffer(int64_t i, int64_t r) const {
    return kIsNarrow<S> ? two_steps_ + (i % 2 * s_.batch + r) * s_.output : nullptr;
  }

  const RecurrenceForwardParams<S>& p_;
  const RecurrenceSizes& s_ = p_.sizes;
  const Order order_{s_};
  T* const two_steps_;
  T* cells_;
};

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
