// The linear system of a recurrence's tangents, solved forwards in time, and its transpose, solved backwards: loops
// over time with one product a step. The gradients of the system by its activations are elementwise.
#pragma once

#include "cpu/gemm/blocking.inl"
#include "cpu/gemm/gemm.inl"
#include "cpu/gemm/gemv.inl"
#include "cpu/gemm/packing.inl"
#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"
#include "cpu/rnn/cells.inl"
#include "cpu/rnn/partition.inl"
#include "cpu/rnn/states.inl"
#include "cpu/rnn/steps.inl"
#include "cpu/simd/load_store.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// The part of the passes that reads a row: the activations of a vector of units and the states before it.
template <typename S, typename C>
class LinearizedPass {
 public:
  LinearizedPass(const LinearizedRecurrence<S>& at, const ThreadTeam& team)
      : at_(at), team_(team), partition_(partition_of<S>(at.sizes, team)), projected_(C::kHasCell && s_.projected()) {}

 protected:
  struct Activations {
    Vec<S> blocks[C::kBlocks];
    Vec<S> h{}, h_before{}, c{}, c_before{};
  };

  // Returns those of position i and batch row r, from unit `col` on.
  Activations activations(int64_t i, int64_t r, int64_t col, int lanes) const {
    const int64_t row = order_.first_row(i) + r;
    const bool continues = r < order_.rows(i - 1);
    const int64_t before = continues ? order_.first_row(i - 1) + r : r;
    Activations v;
    if (C::kSavesBlocks) {
      const S* saved = at_.saved + row * saved_width_ + col;
      for (int b = 0; b < C::kBlocks; ++b) v.blocks[b] = load_partial(saved + b * H, lanes);
      if (C::kHasCell) {
        v.c = load_partial(saved + C::kBlocks * H, lanes);
        const S* c = continues ? at_.saved + before * saved_width_ + C::kBlocks * H : at_.c0 + before * H;
        v.c_before = load_partial(c + col, lanes);
      }
    } else {
      v.h = load_partial(at_.y + row * P + col, lanes);
    }
    if (C::kReadsState) v.h_before = load_partial((continues ? at_.y : at_.h0) + before * P + col, lanes);
    return v;
  }

  static Vec<S> load_or_zeros(const S* p, int64_t offset, int lanes) {
    return p == nullptr ? Vec<S>{} : load_partial(p + offset, lanes);
  }

  const LinearizedRecurrence<S>& at_;
  const RecurrenceSizes& s_ = at_.sizes;
  const ThreadTeam& team_;
  const Order order_{s_};
  const Partition partition_;
  const bool projected_;
  const int64_t H = s_.hidden;
  const int64_t P = s_.output;
  const int64_t gates_ = C::kGates * H;
  const int64_t a_width_ = C::kBlocks * H;
  const int64_t saved_width_ = saved_blocks(s_.mode, projected_) * H;
};

// Sizes of the arrays in the workspace of a tangent pass, in this order in memory.
template <typename S>
struct TangentWorkspace {
  explicit TangentWorkspace(const RecurrenceSizes& s)
      : hh_gate(aligned(packed_size<S>(s.hidden, s.output))),
        hr(s.projected() ? aligned(packed_size<S>(s.output, s.hidden)) : 0),
        m(s.projected() ? aligned(s.batch * s.hidden) : 0),
        total(gates_of(s.mode) * hh_gate + hr + m) {}

  int64_t hh_gate;  // packed W_hh, per gate
  int64_t hr;       // packed W_hr
  int64_t m;        // output of a step before the projection
  int64_t total;
};

template <typename S>
static int64_t tangent_workspace(const RecurrenceSizes& s) {
  return TangentWorkspace<S>(s).total;
}

template <typename S, typename C>
class TangentPass : LinearizedPass<S, C> {
  using Base = LinearizedPass<S, C>;
  using Base::a_width_, Base::at_, Base::gates_, Base::H, Base::order_, Base::P, Base::partition_, Base::projected_,
      Base::s_, Base::team_;

 public:
  TangentPass(const RecurrenceTangentParams<S>& p, const ThreadTeam& team)
      : Base(p.at, team),
        p_(p),
        packed_hh_(p.workspace),
        packed_hr_(packed_hh_ + C::kGates * sizes_.hh_gate),
        m_(packed_hr_ + sizes_.hr) {}

  void run() {
    for (int g = 0; g < C::kGates; ++g) {
      pack_transposed(WeightRows<S>{at_.w_hh + g * H * P, P, H}, H, P, team_.slice(panels_of<S>(H)),
                      packed_hh_ + g * sizes_.hh_gate);
    }
    if (projected_) {
      pack_transposed(WeightRows<S>{at_.w_hr, H, P}, P, H, team_.slice(panels_of<S>(P)), packed_hr_);
    }
    team_.sync();
    for (int64_t i = 0; i < s_.steps; ++i) {
      const Range all = intersect(partition_.rows, {0, order_.rows(i)});
      step(i, intersect(all, {0, order_.rows(i - 1)}));
      step(i, intersect(all, {order_.rows(i - 1), order_.rows(i)}));
      if (projected_) {
        if (partition_.barrier) team_.sync();
        product(
            Rows<S>{m_ + all.begin * H, H}, all.size(), H, packed_hr_, P, Panels{partition_.output_panels, i % 2 != 0},
            [](int64_t, int64_t) {},
            [&](int64_t r, int64_t col, Vec<S> h, int lanes) { store_h(i, all.begin + r, col, h, lanes); });
      }
      if (partition_.barrier) team_.sync();
    }
  }

 private:
  // Rows that all continue, or all start.
  void step(int64_t i, Range r) {
    if (r.size() == 0) return;
    const S* h_before = r.begin < order_.rows(i - 1) ? p_.h + (order_.first_row(i - 1) + r.begin) * P
                        : p_.h0 == nullptr           ? nullptr
                                                     : p_.h0 + r.begin * P;
    if (h_before == nullptr) {
      for (int64_t row = r.begin; row < r.end; ++row) {
        for_each_vector<S>(partition_.columns.size(), [&](int64_t j, int lanes) {
          Vec<S> zeros[C::kGates] = {};
          finish(i, row, partition_.columns.begin + j, zeros, Vec<S>{}, lanes);
        });
      }
      return;
    }
    gates_product<C::kGates>(
        Rows<S>{h_before, P}, r.size(), P, packed_hh_, sizes_.hh_gate, H, Panels{partition_.panels, i % 2 != 0},
        [](int64_t, int64_t) {},
        [&](int64_t row, int64_t col, Vec<S>(&products)[C::kGates], int lanes) {
          const Vec<S> before = C::kReadsState ? load_partial(h_before + row * P + col, lanes) : Vec<S>{};
          finish(i, r.begin + row, col, products, before, lanes);
        });
  }

  void finish(int64_t i, int64_t r, int64_t col, Vec<S> (&products)[C::kGates], Vec<S> h_before, int lanes) {
    const int64_t row = order_.first_row(i) + r;
    Vec<S> a[C::kBlocks];
    for (int b = 0; b < C::kBlocks; ++b) {
      a[b] = Base::load_or_zeros(p_.v_a, row * a_width_ + b * H + col, lanes);
      if (state_gate<C>(b) >= 0) a[b] += products[state_gate<C>(b)];
      store_partial(p_.a + row * a_width_ + b * H + col, a[b], lanes);
    }
    Vec<S> c{}, v_c{};
    if (C::kHasCell) {
      const bool continues = r < order_.rows(i - 1);
      c = continues ? load_partial(p_.c + (order_.first_row(i - 1) + r) * H + col, lanes)
                    : Base::load_or_zeros(p_.c0, r * H + col, lanes);
      v_c = Base::load_or_zeros(p_.v_c, row * H + col, lanes);
    }
    const auto at = Base::activations(i, r, col, lanes);
    const Vec<S> h = C::template tangent<S>(at.blocks, at.h, at.h_before, at.c, at.c_before, a, h_before, c, v_c);
    if (C::kHasCell) store_partial(p_.c + row * H + col, c, lanes);
    if (projected_) {
      store_partial(m_ + r * H + col, h, lanes);
    } else {
      store_h(i, r, col, h, lanes);
    }
  }

  void store_h(int64_t i, int64_t r, int64_t col, Vec<S> h, int lanes) {
    const int64_t offset = (order_.first_row(i) + r) * P + col;
    store_partial(p_.h + offset, h + Base::load_or_zeros(p_.v_h, offset, lanes), lanes);
  }

  const RecurrenceTangentParams<S>& p_;
  const TangentWorkspace<S> sizes_{s_};
  S* packed_hh_;
  S* packed_hr_;
  S* m_;
};

// Whether the pass has one product with W_hh, whose rows are too few to pack W_hh for them.
static inline bool one_small_step(const RecurrenceSizes& s) { return s.steps == 1 && s.batch <= kUnpackedGradientRows; }

// Sizes of the arrays in the workspace of an adjoint pass, in this order in memory.
template <typename S>
struct AdjointWorkspace {
  explicit AdjointWorkspace(const RecurrenceSizes& s)
      : hh(one_small_step(s) ? 0 : aligned(packed_size<S>(s.output, gates_of(s.mode) * s.hidden))),
        hr(s.projected() ? aligned(packed_size<S>(s.hidden, s.output)) : 0),
        carry(aligned(s.batch * s.hidden)),
        total(hh + hr + carry) {}

  int64_t hh;     // packed W_hh
  int64_t hr;     // packed W_hr
  int64_t carry;  // the gradient that passes from step to step besides the product
  int64_t total;
};

template <typename S>
static int64_t adjoint_workspace(const RecurrenceSizes& s) {
  return AdjointWorkspace<S>(s).total;
}

template <typename S, typename C>
class AdjointPass : LinearizedPass<S, C> {
  using Base = LinearizedPass<S, C>;
  using Base::a_width_, Base::at_, Base::gates_, Base::H, Base::order_, Base::P, Base::partition_, Base::projected_,
      Base::s_, Base::saved_width_, Base::team_;

 public:
  AdjointPass(const RecurrenceAdjointParams<S>& p, const ThreadTeam& team)
      : Base(p.at, team),
        p_(p),
        packed_hh_(p.workspace),
        packed_hr_(packed_hh_ + sizes_.hh),
        carry_(packed_hr_ + sizes_.hr) {}

  void run() {
    const bool packs = !one_small_step(s_);
    if (packs) pack_rows(WeightRows<S>{at_.w_hh, P, gates_}, P, gates_, team_.slice(panels_of<S>(P)), packed_hh_);
    if (projected_) {
      pack_rows(WeightRows<S>{at_.w_hr, H, P}, H, P, team_.slice(panels_of<S>(H)), packed_hr_);
    }
    start_columns(static_cast<const S*>(nullptr), carry_, H, partition_.rows, partition_.columns);
    team_.sync();
    for (int64_t i = s_.steps - 1; i >= 0; --i) step(i);
    if (packs) {
      into_h0(0, intersect(partition_.rows, {0, order_.rows(0)}));
    } else {
      into_h0_unpacked();
    }
    if (C::kHasCell) copy_columns(carry_, p_.dc0, H, partition_.rows, partition_.columns);
  }

 private:
  void step(int64_t i) {
    const int64_t later = order_.rows(i + 1);
    const Range all = intersect(partition_.rows, {0, order_.rows(i)});
    const Range continuing = intersect(all, {0, later});
    if (continuing.size() > 0) {
      to_state(i + 1, continuing, [&](int64_t m, int64_t col, Vec<S> value, int lanes) {
        finish(i, continuing.begin + m, col, value, lanes);
      });
    }
    const Range ending = intersect(all, {later, order_.rows(i)});
    for (int64_t r = ending.begin; r < ending.end; ++r) {
      for_each_vector<S>(partition_.output_columns.size(), [&](int64_t j, int lanes) {
        finish(i, r, partition_.output_columns.begin + j, Vec<S>{}, lanes);
      });
    }
    if (projected_) {
      if (partition_.barrier) team_.sync();
      product(
          Rows<S>{p_.h + (order_.first_row(i) + all.begin) * P, P}, all.size(), P, packed_hr_, H,
          Panels{partition_.panels, i % 2 != 0}, [](int64_t, int64_t) {},
          [&](int64_t m, int64_t col, Vec<S> dm, int lanes) { through_cell(i, all.begin + m, col, dm, lanes); });
    }
    into_h0(i + 1, intersect(partition_.rows, {order_.rows(i), later}));  // rows that joined there
    if (partition_.barrier) team_.sync();
  }

  // a of position i times W_hh, for rows r. W_hh multiplies the last blocks of a.
  template <typename Store>
  void to_state(int64_t i, Range r, Store store) {
    const S* a = p_.a + (order_.first_row(i) + r.begin) * a_width_;
    product(
        Rows<S>{a + a_width_ - gates_, a_width_}, r.size(), gates_, packed_hh_, P,
        Panels{partition_.output_panels, i % 2 != 0}, [](int64_t, int64_t) {}, store);
  }

  void into_h0(int64_t i, Range r) {
    if (r.size() == 0) return;
    to_state(i, r, [&](int64_t row, int64_t col, Vec<S> value, int lanes) {
      const int64_t offset = (r.begin + row) * P + col;
      if (C::kCarries && !C::kHasCell) value += load_partial(carry_ + offset, lanes);
      store_partial(p_.dh0 + offset, value, lanes);
    });
  }

  void into_h0_unpacked() {
    const Range r = partition_.rows, columns = partition_.output_columns;
    product_unpacked(p_.a + r.begin * a_width_ + a_width_ - gates_, a_width_, r.size(), gates_, at_.w_hh, P,
                     p_.dh0 + r.begin * P, P, columns);
    if (!C::kCarries || C::kHasCell) return;
    for (int64_t row = r.begin; row < r.end; ++row) {
      for_each_vector<S>(columns.size(), [&](int64_t j, int lanes) {
        S* const dh0 = p_.dh0 + row * P + columns.begin + j;
        store_partial(dh0, load_partial(dh0, lanes) + load_partial(carry_ + row * P + columns.begin + j, lanes), lanes);
      });
    }
  }

  // Adds what does not come from later products to the gradient of a state.
  void finish(int64_t i, int64_t r, int64_t col, Vec<S> dh, int lanes) {
    const int64_t offset = (order_.first_row(i) + r) * P + col;
    dh += Base::load_or_zeros(p_.g_h, offset, lanes);
    if (projected_) {
      store_partial(p_.h + offset, dh, lanes);
    } else {
      through_cell(i, r, col, dh, lanes);
    }
  }

  void through_cell(int64_t i, int64_t r, int64_t col, Vec<S> dh, int lanes) {
    const int64_t row = order_.first_row(i) + r;
    auto at = Base::activations(i, r, col, lanes);
    Vec<S> carry{}, state;
    if (C::kCarries) carry = load_partial(carry_ + r * H + col, lanes);
    if (C::kHasCell) carry += Base::load_or_zeros(p_.g_c, row * H + col, lanes);
    Vec<S> from_saved[C::kBlocks] = {};
    Vec<S> dm = dh;  // h before a projection
    if (C::kSavesBlocks && p_.g_saved != nullptr) {
      const S* g_saved = p_.g_saved + row * saved_width_ + col;
      Vec<S> d[C::kBlocks];
      for (int b = 0; b < C::kBlocks; ++b) d[b] = load_partial(g_saved + b * H, lanes);
      C::template activation_backward<S>(at.blocks, d, from_saved);
      if (C::kHasCell) carry += load_partial(g_saved + C::kBlocks * H, lanes);
      if (projected_) dm += load_partial(g_saved + (C::kBlocks + 1) * H, lanes);
    }
    C::template backward<S>(at.blocks, at.h, at.h_before, at.c, at.c_before, dm, carry, state);
    if (C::kCarries) store_partial(carry_ + r * H + col, carry, lanes);
    if (C::kHasCell) {
      store_partial(p_.c + row * H + col, state, lanes);
      if (!projected_) store_partial(p_.h + row * P + col, dh, lanes);
    } else {
      store_partial(p_.h + row * P + col, state, lanes);
    }
    for (int b = 0; b < C::kBlocks; ++b) {
      const int64_t offset = row * a_width_ + b * H + col;
      const Vec<S> direct = from_saved[b] + Base::load_or_zeros(p_.g_a, offset, lanes);
      store_partial(p_.a + offset, at.blocks[b] + direct, lanes);
    }
  }

  const RecurrenceAdjointParams<S>& p_;
  const AdjointWorkspace<S> sizes_{s_};
  S* packed_hh_;
  S* packed_hr_;
  S* carry_;
};

// Elementwise: a thread's rows and columns need nothing of another thread.
template <typename S, typename C>
class CurvaturePass : LinearizedPass<S, C> {
  using Base = LinearizedPass<S, C>;
  using Base::a_width_, Base::H, Base::order_, Base::P, Base::partition_, Base::projected_, Base::s_,
      Base::saved_width_;

 public:
  CurvaturePass(const RecurrenceCurvatureParams<S>& p, const ThreadTeam& team) : Base(p.at, team), p_(p) {}

  void run() {
    const Range columns = partition_.columns;
    for (int64_t i = 0; i < s_.steps; ++i) {
      const Range all = intersect(partition_.rows, {0, order_.rows(i)});
      for (int64_t r = all.begin; r < all.end; ++r) {
        for_each_vector<S>(columns.size(), [&](int64_t j, int lanes) { unit(i, r, columns.begin + j, lanes); });
      }
    }
  }

 private:
  void unit(int64_t i, int64_t r, int64_t col, int lanes) {
    const int64_t row = order_.first_row(i) + r;
    const bool continues = r < order_.rows(i - 1);
    const int64_t first = r * H + col;
    const int64_t before = continues ? (order_.first_row(i - 1) + r) * H + col : first;
    const int64_t here = row * H + col;
    const auto at = Base::activations(i, r, col, lanes);
    Vec<S> a[C::kBlocks], d[C::kBlocks];
    for (int b = 0; b < C::kBlocks; ++b) a[b] = load_partial(p_.a + row * a_width_ + b * H + col, lanes);
    Vec<S> state{}, c{}, adjoint_c{}, d_before{};
    if (C::kCarries) {
      state = continues ? load_partial(p_.state + before, lanes) : Base::load_or_zeros(p_.state0, first, lanes);
    }
    if (C::kHasCell) {
      c = load_partial(p_.state + here, lanes);
      adjoint_c = load_partial(p_.adjoint_c + here, lanes);
    }
    const Vec<S> d_state = C::template curvature<S>(at.blocks, at.h, at.h_before, at.c, at.c_before, a, state, c,
                                                    load_partial(p_.adjoint_h + here, lanes), adjoint_c, d, d_before);
    if (C::kSavesBlocks) {
      S* saved = p_.d_saved + row * saved_width_ + col;
      for (int b = 0; b < C::kBlocks; ++b) store_partial(saved + b * H, d[b], lanes);
      if (projected_) store_partial(saved + (C::kBlocks + 1) * H, Vec<S>{}, lanes);
    }
    // The gradient of a state comes from its own step and from the next one.
    store_partial(d_of_state(row) + col, d_state, lanes);
    if (!C::kCarries) return;
    if (continues) {
      S* last = d_of_state(order_.first_row(i - 1) + r) + col;
      store_partial(last, load_partial(last, lanes) + d_before, lanes);
    } else {
      store_partial(p_.d_state0 + first, d_before, lanes);
    }
  }

  // The gradient of the cell state, which is saved, or of y.
  S* d_of_state(int64_t row) const {
    return C::kHasCell ? p_.d_saved + row * saved_width_ + C::kBlocks * H : p_.d_y + row * P;
  }

  const RecurrenceCurvatureParams<S>& p_;
};

template <typename S>
static void recurrence_tangent(const RecurrenceTangentParams<S>& p, const ThreadTeam& team) {
  with_cell(p.at.sizes.mode, [&](auto cell) { TangentPass<S, decltype(cell)>(p, team).run(); });
}

template <typename S>
static void recurrence_adjoint(const RecurrenceAdjointParams<S>& p, const ThreadTeam& team) {
  with_cell(p.at.sizes.mode, [&](auto cell) { AdjointPass<S, decltype(cell)>(p, team).run(); });
}

template <typename S>
static void recurrence_curvature(const RecurrenceCurvatureParams<S>& p, const ThreadTeam& team) {
  with_cell(p.at.sizes.mode, [&](auto cell) { CurvaturePass<S, decltype(cell)>(p, team).run(); });
}

template <typename S>
static constexpr LinearizedRecurrenceKernels<S> kLinearizedRecurrenceKernels = {
    .threads = recurrence_threads,
    .tangent_workspace = tangent_workspace<S>,
    .adjoint_workspace = adjoint_workspace<S>,
    .tangent = recurrence_tangent<S>,
    .adjoint = recurrence_adjoint<S>,
    .curvature = recurrence_curvature<S>,
};

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
