// The prefix form of attention pooling, backward, if there are many rows: a thread group goes through a batch row
// alone, from the last position to the first. So e and its gradient are read once, where prefix_pool_backward.cu, whose
// formulas are the same, reads them twice.
//
// A segment of the row is copied to shared memory with the row of c before it, its state. While the next one arrives,
// the dot products g_t . c_t of the segment are computed from its beginning, and then its results from its end.
//
// In 16 bits that row of c is rounded, and its error would add up in K. So K gains G . (c - c') after a segment, where
// c is its last state and c' the row from which the later states began: the gradient of L, G . c - K, does not change.
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/pooling/columns.cuh"
#include "cuda/pooling/launchers.h"
#include "cuda/reduce_partial_sums.h"

namespace llm_ext {
namespace cuda {
namespace {

template <typename S>
struct RowGradientParams {
  PrefixPoolBackwardParams<S> call;
  PoolPlan plan;
  SlotsLayout layout;
  int segments;            // of a row
  Compute<S>* partial_du;  // [B, D] out; null: not wanted
};

template <typename S, int N>
LLM_EXT_SHARING_KERNEL(kPoolThreads, kBlocks<N>)
void prefix_row_gradients(LLM_EXT_PARAMS RowGradientParams<S> p) {
  using T = Compute<S>;
  constexpr int R = kBackwardRows<N>;
  constexpr bool kRounded = !std::is_same_v<S, T>;
  const PrefixPoolBackwardParams<S>& call = p.call;
  const PoolInput<S>& in = call.in;
  const int slot = static_cast<int>(p.plan.slot), in_block = thread_index() / p.plan.group_threads;
  const int64_t group = static_cast<int64_t>(block_x()) * (kPoolThreads / p.plan.group_threads) + in_block, D = in.dim;
  const bool exists = group < in.batch;
  const int64_t b = exists ? group : 0;
  const Columns<S, N> columns(D, p.plan);
  GroupSum<T> sum = group_sum<T>(p.plan.group_threads);

  // Segment i has count_of(i) positions before end_of(i).
  const auto end_of = [&](int i) { return in.steps - static_cast<int64_t>(i) * slot; };
  const auto most_of = [&](int i) { return end_of(i) < slot ? static_cast<int>(end_of(i)) : slot; };
  const auto count_of = [&](int i) { return exists ? most_of(i) : 0; };
  // A slot has rows of e and grad_c and the row of c before them, and numbers of each position.
  unsigned char* own = shared_memory() + p.layout.sums + in_block * p.layout.group;
  const auto row_at = [&](int i, int r) { return reinterpret_cast<S*>(own) + (i % kSlots * (2 * slot + 1) + r) * D; };
  const auto e_at = [&](int i, int r) { return row_at(i, r); };
  const auto g_at = [&](int i, int r) { return row_at(i, slot + r); };
  const auto before_at = [&](int i) { return row_at(i, 2 * slot); };
  const auto shares_at = [&](int i) { return reinterpret_cast<T*>(own + p.layout.rows) + i % kSlots * 2 * slot; };
  const auto products_at = [&](int i) { return shares_at(i) + slot; };

  // Each thread copies the columns that it will read.
  const auto load_segment = [&](int i) {
    if (i >= p.segments) return;
    const int count = count_of(i);
    if (count == 0) return;
    const int64_t begin = end_of(i) - count, offset = offset_of(in, b, begin);
    const T* shares = call.share + b * in.steps + begin;
    const auto copy = [&](S* to, const S* from) {
      columns.for_each([&](int, int64_t column) {
        if (column < D) copy_async(to + column, from + column);
      });
    };
    constexpr int kShares = 4;
    for (int r0 = 0; r0 < count; r0 += kShares) {
      T share[kShares];
#pragma unroll
      for (int r = 0; r < kShares; ++r) share[r] = r0 + r < count ? shares[r0 + r] : T(0);
#pragma unroll
      for (int r = 0; r < kShares; ++r) {
        if (r0 + r >= count) continue;
        const int64_t at = offset + (r0 + r) * in.e_step_stride;
        if (columns.writes(r)) shares_at(i)[r0 + r] = share[r];
        if (share[r] != T(0)) copy(e_at(i, r0 + r), in.e + at);
        if (call.grad_c != nullptr) copy(g_at(i, r0 + r), call.grad_c + at);
      }
    }
    if (begin > 0) copy(before_at(i), call.c + offset - in.e_step_stride);
  };

  const auto add = [&](Held<S, N>& state, T factor, const S* row) {
    Tile<S, N, 1> tile;
    tile.load(columns, [&](int) { return row; });
    columns.for_each_number(
        [&](int n, int64_t column, int j) { state.at(n, column, j) += factor * tile.at(0, n, column, j); });
  };
  // The state before position t >= 0, whose row of c is `row` if t > 0.
  const auto begin_state = [&](Held<S, N>& state, int64_t t, const S* row) {
    state.begin(columns, nullptr, t > 0 || call.c0 == nullptr ? nullptr : call.c0 + b * D);
    if (t > 0) add(state, T(1), row);
  };
  const auto dot = [&](Held<S, N>& x, Held<S, N>& y) {
    T product[1] = {T(0)};
    columns.for_each_number(
        [&](int n, int64_t column, int j) { product[0] += x.at(n, column, j) * y.at(n, column, j); });
    sum(product);
    return product[0];
  };

  // G and K after the segment that is next. In 16 bits K gains G . c of the last position with the first segment.
  Held<S, N> carried;
  carried.begin(columns, nullptr, exists && call.grad_c_n != nullptr ? call.grad_c_n + b * D : nullptr);
  T k = exists && call.grad_l_n != nullptr ? -call.grad_l_n[b] : T(0);
  if (!kRounded || p.segments == 0) {
    Held<S, N> last;
    begin_state(last, exists ? in.steps : 0, call.c + offset_of(in, b, in.steps - 1));
    k += dot(carried, last);
  }

  const auto multiply = [&](int i) {
    const int count = count_of(i);
    Held<S, N> state;
    begin_state(state, count > 0 ? end_of(i) - count : 0, before_at(i));
    // The row from which the states of the later positions began.
    [[maybe_unused]] const S* later = count > 0 && i > 0 ? call.c + offset_of(in, b, end_of(i) - 1) : nullptr;
    const int most = most_of(i);
    for (int r0 = 0; r0 < most; r0 += R) {
      T products[R] = {}, share[R];
#pragma unroll
      for (int r = 0; r < R; ++r) share[r] = r0 + r < count ? shares_at(i)[r0 + r] : T(0);
      Tile<S, N, R> e, g;
      e.load(columns, [&](int r) { return share[r] != T(0) ? e_at(i, r0 + r) : nullptr; });
      g.load(columns, [&](int r) { return r0 + r < count && call.grad_c != nullptr ? g_at(i, r0 + r) : nullptr; });
      columns.for_each_number([&](int n, int64_t column, int j) {
        T c = state.at(n, column, j);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          c = (T(1) - share[r]) * c + share[r] * e.at(r, n, column, j);
          products[r] += g.at(r, n, column, j) * c;
        }
        state.at(n, column, j) = c;
      });
      sum(products);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (columns.writes(r) && r0 + r < count) products_at(i)[r0 + r] = products[r];
      }
    }
    if constexpr (kRounded) {
      add(state, T(-1), later);
      k += dot(carried, state);
    }
    block_barrier();
  };

  Tile<S, N, 1> u;
  u.load(columns, [&](int) { return in.u; });
  Held<S, N> du;
  du.begin(columns, nullptr, nullptr);
  const auto write = [&](int i) {
    const int count = count_of(i), most = most_of(i);
    for (int r0 = 0; r0 < most; r0 += R) {
      // Row r of a tile is position last - r of the segment.
      const int last = count - 1 - r0;
      T share[R], dots[R] = {}, ds[R];
#pragma unroll
      for (int r = 0; r < R; ++r) share[r] = r <= last ? shares_at(i)[last - r] : T(0);
      Tile<S, N, R> e, g;
      e.load(columns, [&](int r) { return share[r] != T(0) ? e_at(i, last - r) : nullptr; });
      g.load(columns, [&](int r) { return r <= last && call.grad_c != nullptr ? g_at(i, last - r) : nullptr; });
      columns.for_each_number([&](int n, int64_t column, int j) {
        T state = carried.at(n, column, j);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          state += g.at(r, n, column, j);
          dots[r] += state * e.at(r, n, column, j);
          state *= T(1) - share[r];
        }
      });
      sum(dots);
      const int64_t t = end_of(i) - 1 - r0;  // of row 0
#pragma unroll
      for (int r = 0; r < R; ++r) {
        ds[r] = T(0);
        if (r > last) continue;
        k += products_at(i)[last - r];
        if (share[r] != T(0)) ds[r] = share[r] * (dots[r] - k);
        k *= T(1) - share[r];
        if (call.dscores != nullptr && columns.writes(r)) call.dscores[b * in.steps + t - r] = narrow<S>(ds[r]);
      }
      S* de = call.de == nullptr ? nullptr : call.de + offset_of(in, b, t);
      columns.for_each([&](int n, int64_t column) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const bool writes = de != nullptr && column < D && r <= last;
          write_pack<N>(writes ? de - r * in.e_step_stride + column : nullptr, [&](int j) {
            T& state = carried.at(n, column, j);
            const T gradient = state + g.at(r, n, column, j);
            state = (T(1) - share[r]) * gradient;
            du.at(n, column, j) += ds[r] * e.at(r, n, column, j);
            return share[r] * gradient + ds[r] * u.at(0, n, column, j);
          });
        }
      });
    }
  };

  load_segment(0);
  for (int i = 0; i < p.segments; ++i) {
    // The segment has arrived, and the slot of the next one is no longer read.
    copy_async_wait();
    block_barrier();
    load_segment(i + 1);
    multiply(i);
    write(i);
  }

  if (exists && p.partial_du != nullptr) du.end(columns, p.partial_du + group * D);
  if (exists && call.dc0 != nullptr) carried.end(columns, call.dc0 + b * D);
  Held<S, N> c0;
  begin_state(c0, 0, nullptr);
  const T with_c0 = dot(carried, c0);
  if (exists && call.dl0 != nullptr && columns.rank == 0) call.dl0[b] = with_c0 - k;
}

}  // namespace

template <typename S>
int prefix_pool_backward_rows(const PrefixPoolBackwardParams<S>& call, const PoolPlan& plan, void* stream) {
  const PoolInput<S>& in = call.in;
  const int in_block = kPoolThreads / plan.group_threads;
  RowGradientParams<S> p = {};
  p.call = call;
  p.plan = plan;
  p.layout = slots_layout(plan, in.dim, sizeof(S), sizeof(Compute<S>));
  p.segments = static_cast<int>((in.steps + plan.slot - 1) / plan.slot);
  p.partial_du = call.du == nullptr ? nullptr : call.workspace;
  LaunchShape shape;
  shape.grid_x = (in.batch + in_block - 1) / in_block;
  shape.threads = kPoolThreads;
  shape.shared_bytes = static_cast<size_t>(p.layout.sums + in_block * p.layout.group);
  const int error = plan.packs == 1 ? launch(prefix_row_gradients<S, 1>, shape, p, stream)
                                    : launch(prefix_row_gradients<S, 2>, shape, p, stream);
  if (error != 0 || call.du == nullptr) return error;
  return reduce_partial_sums(PartialSums<S>{1, in.batch, in.dim, p.partial_du, nullptr, call.du, nullptr, nullptr},
                             stream);
}

#define FOR(S) template int prefix_pool_backward_rows(const PrefixPoolBackwardParams<S>&, const PoolPlan&, void*);
FOR(float)
FOR(double)
FOR(BFloat16)
FOR(Float16)
#undef FOR

}  // namespace cuda
}  // namespace llm_ext
