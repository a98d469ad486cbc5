// The backward pass: a loop backwards in time over blocks of steps, which computes dz of the block, and after each
// block its products: dx, and the terms that the block adds to the gradients of weights and biases.
#pragma once

#include "cpu/gemm/blocking.inl"
#include "cpu/gemm/gemm.inl"
#include "cpu/gemm/packing.inl"
#include "cpu/gemm/weight_gradients.inl"
#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"
#include "cpu/rnn/cells.inl"
#include "cpu/rnn/partition.inl"
#include "cpu/rnn/states.inl"
#include "cpu/rnn/steps.inl"
#include "cpu/rnn/workspace.inl"
#include "cpu/simd/float16.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// The state before each row of the sequence, from row `first` on: the right side of dW_hh. Call with ascending i. Null
// means zeros.
template <typename S>
class PreviousState {
 public:
  PreviousState(const RecurrenceBackwardParams<S>& p, int64_t first) : p_(p), first_(first) {
    const RecurrenceSizes& s = p.sizes;
    int64_t high = s.steps - 1;
    while (t_ < high) {  // the last step that starts at or before `first`
      const int64_t middle = (t_ + high + 1) / 2;
      if (s.row_offsets[middle] <= first) {
        t_ = middle;
      } else {
        high = middle - 1;
      }
    }
  }

  const S* operator()(int64_t i) {
    const RecurrenceSizes& s = p_.sizes;
    const int64_t row = first_ + i;
    while (row >= s.row_offsets[t_ + 1]) ++t_;
    const int64_t r = row - s.row_offsets[t_];
    const int64_t before = s.reverse ? t_ + 1 : t_ - 1;
    if (before >= 0 && before < s.steps && r < s.row_offsets[before + 1] - s.row_offsets[before]) {
      return p_.y + (s.row_offsets[before] + r) * s.output;
    }
    return p_.h0 == nullptr ? nullptr : p_.h0 + r * s.output;
  }

 private:
  const RecurrenceBackwardParams<S>& p_;
  int64_t first_;
  int64_t t_ = 0;
};

// The right side of dW_hh for weight_gradients; one type for all cells.
template <typename S>
struct PreviousStates {
  const RecurrenceBackwardParams<S>& p;

  PreviousState<S> operator()(int64_t first) const { return {p, first}; }
};

// Stores the product of rows of dz with W_hh to dh0, for rows that joined at that step. Adds `carry` unless it is null.
template <typename S>
__attribute__((noinline)) static void store_h0_gradient(Rows<Factor<S>> dz, int64_t rows, int64_t gates,
                                                        const S* packed_hh, int64_t P, Panels panels,
                                                        const Compute<S>* carry, S* dh0) {
  product(
      dz, rows, gates, packed_hh, P, panels, [](int64_t, int64_t) {},
      [=](int64_t row, int64_t col, Vec<Compute<S>> value, int lanes) {
        const int64_t offset = row * P + col;
        if (carry != nullptr) value += load_partial(carry + offset, lanes);
        store_partial(dh0 + offset, value, lanes);
      });
}

// The backward pass of one thread of the team.
template <typename S, typename C>
class BackwardPass {
  using T = Compute<S>;
  using R = S;
  using L = Factor<S>;

 public:
  BackwardPass(const RecurrenceBackwardParams<S>& p, const ThreadTeam& team)
      : p_(p), team_(team), partition_(partition_of<S>(p.sizes, team)) {
    const BackwardWorkspace<S> sizes(s_, team.size);
    T* next = p.workspace;
    const auto take = [&](int64_t elements) {
      T* taken = next;
      next += elements;
      return taken;
    };
    packed_hh_ = reinterpret_cast<R*>(take(sizes.hh));
    packed_hr_ = reinterpret_cast<R*>(take(sizes.hr));
    packed_ih_ = reinterpret_cast<R*>(take(sizes.ih));
    carry_ = take(sizes.carry);
    dh_ = reinterpret_cast<L*>(take(sizes.dh));
    block_ = {reinterpret_cast<L*>(take(sizes.dz)), 0, 0, {s_.steps, s_.steps}};
    later_block_ = {reinterpret_cast<L*>(take(sizes.dz)), 0, 0, {s_.steps, s_.steps}};
    T* sums = take(sizes.sums);
    space_ = reinterpret_cast<L*>(next + team.rank * sizes.block);
    for_each_gradient([&](T*& sum, S* result, int64_t n) {
      if constexpr (kIsNarrow<S>) {
        sum = result == nullptr ? nullptr : sums;
        sums += n;
      } else {
        sum = result;
      }
    });
  }

  void run() {
    pack();
    if (C::kCarries) start_columns(p_.grad_c_n, carry_, H, partition_.rows, partition_.columns);
    team_.sync();
    do {
      begin_block();
      for (int64_t i = block_.steps.end - 1; i >= block_.steps.begin; --i) step(i);
      team_.sync();
      products();
      // There is one dh buffer: the next block must not overwrite it while it is read.
      if (projected()) team_.sync();
    } while (block_.steps.begin > 0);
    into_h0(0, intersect(partition_.rows, {0, order_.rows(0)}));
    if (p_.dc0 != nullptr) copy_columns(carry_, p_.dc0, H, partition_.rows, partition_.columns);
    if constexpr (kIsNarrow<S>) {
      team_.sync();
      for_each_gradient([&](T*& sum, S* result, int64_t n) {
        const Range slice = team_.slice(n, kLanes<T>);
        if (result != nullptr) convert(sum + slice.begin, result + slice.begin, slice.size());
      });
    }
  }

 private:
  bool projected() const { return C::kHasCell && s_.projected(); }

  // A block of steps, whose rows are adjacent.
  struct Block {
    L* dz;          // [rows, blocks H]
    int64_t first;  // its first row of the sequence
    int64_t rows;
    Range steps;  // positions in the order
  };

  // Calls body(sum, result, elements) for each gradient of weights and biases.
  template <typename Body>
  void for_each_gradient(Body body) {
    body(dw_ih_, p_.dw_ih, gates_ * s_.input);
    body(dw_hh_, p_.dw_hh, gates_ * P);
    body(dw_hr_, p_.dw_hr, projected() ? P * H : 0);
    body(db_ih_, p_.db_ih, gates_);
    body(db_hh_, p_.db_hh, gates_);
  }

  void pack() {
    pack_rows(WeightRows<S>{p_.w_hh, P, gates_}, P, gates_, team_.slice(panels_of<T>(P)), packed_hh_);
    if (projected()) pack_rows(WeightRows<S>{p_.w_hr, H, P}, H, P, team_.slice(panels_of<T>(H)), packed_hr_);
    if (p_.dx != nullptr) {
      pack_rows(input_weight_rows(p_.w_ih, s_), s_.input, gates_, team_.slice(panels_of<T>(s_.input)), packed_ih_);
    }
  }

  // Moves on to the steps before the block: up to KC rows of the weight gradients, but at least one step.
  void begin_block() {
    Block next = {later_block_.dz, 0, 0, {block_.steps.begin, block_.steps.begin}};
    while (next.steps.begin > 0) {
      const int64_t more = order_.rows(next.steps.begin - 1);
      if (next.rows > 0 && next.rows + more > kGradientKC<T>) break;
      next.rows += more;
      --next.steps.begin;
    }
    if (next.rows > 0) next.first = order_.first_row(s_.reverse ? next.steps.end - 1 : next.steps.begin);
    later_block_ = block_;
    block_ = next;
  }

  // dz of position i, batch row r. The step after the block's last belongs to the later block.
  L* dz_of(int64_t i, int64_t r) const {
    const Block& block = i < block_.steps.end ? block_ : later_block_;
    return block.dz + (order_.first_row(i) + r - block.first) * dz_width_;
  }
  L* dh_of(int64_t i, int64_t r) const { return dh_ + (order_.first_row(i) + r - block_.first) * P; }

  // The state of batch row r before position i; null: zeros.
  const S* state_before(int64_t i, int64_t r) const {
    if (r < order_.rows(i - 1)) return p_.y + (order_.first_row(i - 1) + r) * P;
    return p_.h0 == nullptr ? nullptr : p_.h0 + r * P;
  }
  const S* cell_before(int64_t i, int64_t r) const {
    if (r < order_.rows(i - 1)) return p_.saved + (order_.first_row(i - 1) + r) * saved_width_ + C::kBlocks * H;
    return p_.c0 == nullptr ? nullptr : p_.c0 + r * H;
  }

  // From the complete gradient of a vector of units' output to the gradients of their pre-activations.
  void through_cell(int64_t i, int64_t r, int64_t col, Vec<T> dh, int lanes) {
    const int64_t row = order_.first_row(i) + r;
    Vec<T> blocks[C::kBlocks];
    Vec<T> h{}, h_before{}, c{}, c_before{}, carried{};
    if (C::kSavesBlocks) {
      const S* saved = p_.saved + row * saved_width_ + col;
      for (int b = 0; b < C::kBlocks; ++b) blocks[b] = load_partial(saved + b * H, lanes);
      if (C::kHasCell) c = load_partial(saved + C::kBlocks * H, lanes);
    } else {
      h = load_partial(p_.y + row * P + col, lanes);
    }
    if (C::kReadsState) {
      const S* before = state_before(i, r);
      if (before != nullptr) h_before = load_partial(before + col, lanes);
    }
    if (C::kHasCell) {
      const S* before = cell_before(i, r);
      if (before != nullptr) c_before = load_partial(before + col, lanes);
    }
    if (C::kCarries) carried = load_partial(carry_ + r * H + col, lanes);
    Vec<T> state;
    C::template backward<T>(blocks, h, h_before, c, c_before, dh, carried, state);
    if (C::kCarries) store_partial(carry_ + r * H + col, carried, lanes);
    L* dz = dz_of(i, r) + col;
    for (int b = 0; b < C::kBlocks; ++b) store_partial(dz + b * H, blocks[b], lanes);
  }

  // Completes the gradient of a state, given the terms of later steps, and continues to the pre-activations unless the
  // output is projected.
  void finish(int64_t i, int64_t r, int64_t col, Vec<T> dh, int lanes) {
    if (p_.grad_y != nullptr) dh += load_partial(p_.grad_y + (order_.first_row(i) + r) * P + col, lanes);
    if (projected()) {
      store_partial(dh_of(i, r) + col, dh, lanes);
    } else {
      through_cell(i, r, col, dh, lanes);
    }
  }

  // dz of position i times W_hh, for rows r. W_hh multiplies the last blocks of dz.
  template <typename Fetch, typename Store>
  void to_state(int64_t i, Range r, Fetch fetch, Store store) {
    product(state_rows(i, r), r.size(), gates_, packed_hh_, P, output_panels(i), fetch, store);
  }
  Rows<L> state_rows(int64_t i, Range r) const { return {dz_of(i, r.begin) + dz_width_ - gates_, dz_width_}; }
  Panels output_panels(int64_t i) const { return {partition_.output_panels, i % 2 != 0}; }

  void into_h0(int64_t i, Range r) {
    if (p_.dh0 == nullptr || r.size() == 0) return;
    const T* carry = C::kCarries && !C::kHasCell ? carry_ + r.begin * P : nullptr;
    store_h0_gradient(state_rows(i, r), r.size(), gates_, packed_hh_, P, output_panels(i), carry, p_.dh0 + r.begin * P);
  }

  // Prefetches the memory that finish() needs of a row from a column on.
  void fetch(int64_t i, int64_t r, int64_t col) {
    const int64_t row = order_.first_row(i) + r;
    if (p_.grad_y != nullptr) __builtin_prefetch(p_.grad_y + row * P + col);
    if (projected()) return;
    if (!C::kSavesBlocks) __builtin_prefetch(p_.y + row * P + col);
    for (int b = 0; b < saved_blocks(C::kMode, false); ++b) {
      __builtin_prefetch(p_.saved + row * saved_width_ + b * H + col);
    }
    const L* dz = dz_of(i, r) + col;
    for (int b = 0; b < C::kBlocks; ++b) __builtin_prefetch(dz + b * H, 1);
  }

  void step(int64_t i) {
    const int64_t later = order_.rows(i + 1);
    const Range all = intersect(partition_.rows, {0, order_.rows(i)});
    const Range continuing = intersect(all, {0, later});
    if (continuing.size() > 0) {
      to_state(
          i + 1, continuing, [&](int64_t m, int64_t col) { fetch(i, continuing.begin + m, col); },
          [&](int64_t m, int64_t col, Vec<T> value, int lanes) { finish(i, continuing.begin + m, col, value, lanes); });
    }
    const Range ending = intersect(all, {later, order_.rows(i)});
    for (int64_t r = ending.begin; r < ending.end; ++r) {
      for_each_vector<T>(partition_.output_columns.size(), [&](int64_t j, int lanes) {
        const int64_t col = partition_.output_columns.begin + j;
        finish(i, r, col, p_.grad_h_n == nullptr ? Vec<T>{} : load_partial(p_.grad_h_n + r * P + col, lanes), lanes);
      });
    }
    if (projected()) {
      if (partition_.barrier) team_.sync();
      product(
          Rows<L>{dh_of(i, all.begin), P}, all.size(), P, packed_hr_, H, Panels{partition_.panels, i % 2 != 0},
          [](int64_t, int64_t) {},
          [&](int64_t m, int64_t col, Vec<T> value, int lanes) { through_cell(i, all.begin + m, col, value, lanes); });
    }
    into_h0(i + 1, intersect(partition_.rows, {order_.rows(i), later}));  // rows that joined there
    if (partition_.barrier) team_.sync();
  }

  // The products of a block: dx, and its terms of the gradients of weights and biases.
  void products() {
    if (p_.dx != nullptr) {
      const Range rows = team_.slice(block_.rows, kMR);
      store_product(block_.dz + rows.begin * dz_width_, dz_width_, rows.size(), gates_, packed_ih_, s_.input,
                    p_.dx + (block_.first + rows.begin) * s_.input);
    }
    WeightGradient<S> of_input = {dw_ih_, s_.input, {}, false, p_.x, s_.input};
    WeightGradient<S> of_state = {dw_hh_, P, {}, true, nullptr, 0};
    for (int b = 0; b < C::kBlocks; ++b) {
      of_input.gates[b] = b < C::kGates ? input_gate<C>(b) : -1;
      of_state.gates[b] = state_gate<C>(b);
    }
    const Range rows = {block_.first, block_.first + block_.rows};
    const bool more = block_.steps.end < s_.steps;
    const PreviousStates<S> states_before{p_};
    weight_gradients(states_before, rows, block_.dz, H, C::kBlocks, {of_input, of_state}, more, space_, team_);
    if (projected()) {
      const WeightGradient<S> of_cell = {dw_hr_, H, {0}, false, p_.saved + (C::kBlocks + 1) * H, saved_width_};
      weight_gradients(states_before, rows, dh_, P, 1, {of_cell, {}}, more, space_, team_);
    }
    const Range columns = team_.slice(H, kLanes<T>);
    for (int b = 0; b < C::kBlocks; ++b) {
      const int input = b < C::kGates ? input_gate<C>(b) : -1;
      T* db_ih = db_ih_ == nullptr || input < 0 ? nullptr : db_ih_ + input * H + columns.begin;
      T* db_hh = db_hh_ == nullptr || state_gate<C>(b) < 0 ? nullptr : db_hh_ + state_gate<C>(b) * H + columns.begin;
      column_sums(block_.dz + b * H + columns.begin, block_.rows, dz_width_, columns.size(), db_ih, db_hh, more);
    }
  }

  const RecurrenceBackwardParams<S>& p_;
  const RecurrenceSizes& s_ = p_.sizes;
  const ThreadTeam& team_;
  const Order order_{s_};
  const Partition partition_;
  const int64_t H = s_.hidden;
  const int64_t P = s_.output;
  const int64_t gates_ = C::kGates * H;
  const int64_t dz_width_ = C::kBlocks * H;
  const int64_t saved_width_ = saved_blocks(s_.mode, projected()) * H;
  R* packed_hh_;
  R* packed_hr_;
  R* packed_ih_;
  T* carry_;
  L* dh_;  // [rows of a block, P] gradients of the states, if they are projected
  T* dw_ih_;
  T* dw_hh_;
  T* dw_hr_;
  T* db_ih_;
  T* db_hh_;
  L* space_;
  Block block_;
  Block later_block_;  // the block of the following steps
};

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
