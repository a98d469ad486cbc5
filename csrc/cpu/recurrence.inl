// The recurrence over time, generic over the cell.
//
// Forward: pack the weights, one product for the input projection of the whole sequence (into y, which then holds
// pre-activations), then the loop over time, which turns y into hidden states in place. Backward: the loop over time
// backwards for dz, then one whole-sequence product for each of dx, dw_ih, dw_hh. docs/recurrence.md derives it.
namespace llm_ext {
namespace LLM_EXT_LEVEL {

// Up to so many rows of the sequence (twice as many in one or two steps), weights are read in their own layout instead
// of being packed first. On Zen 3 that takes 6.7 us instead of 7.4 for 16 rows of H = 64 and 200 instead of 239 for
// H = 512; for 32 rows in two steps the same for H = 64 and 220 instead of 279 for H = 512.
constexpr int64_t kDirectRows = 16;
// Multiply-adds that repay one more thread: a team costs some 3 us. T16 H64 takes 8 us on one thread or two.
constexpr double kWorkPerThread = 1.0e5;
// Multiply-adds of one step that repay a barrier, some 0.3 us. B1 H128 (16 thousand) takes 0.8 us with it and 1.0
// without.
constexpr double kStepWorkPerThread = 8.0e3;
// Fewer rows a thread than this leave the micro-kernel starved for loads: split the columns instead. B4 H512 on two
// threads takes 25 us a step by columns and 34 by rows, B8 the same either way.
constexpr int64_t kRowsPerThread = 4;
// The weight gradients are products over all rows of the sequence. A block of such a product is so many of those rows
// deep (384 floats: 1 % quicker than 256), so many columns of dz high, whose packed form stays in the second-level
// cache, and so many panels wide, so that little of dz is packed twice.
template <typename T>
constexpr int64_t kGradientDepth = 1536 / sizeof(T);
constexpr int64_t kGradientHeight = 16 * kRows;
constexpr int64_t kGradientPanels = 2048 / (kPanelVectors * LLM_EXT_VECTOR_BYTES);
// Workspace pieces start on a cache line.
constexpr int64_t kAlign = 64;

static inline int64_t aligned(int64_t elements) { return divide_up(elements, kAlign) * kAlign; }

// How a team shares the loop over time.
enum class Split {
  kRows,     // each thread runs its own batch rows; no barrier
  kColumns,  // each thread computes its own columns of every step; a barrier each step
  kOne       // too little work in a step to share: one thread runs it
};

template <typename T>
static inline int64_t total_rows(const RecurrenceSizes<T>& s) {
  return s.row_offsets[s.steps];
}

template <typename T>
static inline Split choose_split(const RecurrenceSizes<T>& s, int threads) {
  if (threads == 1) return Split::kOne;
  if (s.batch >= kRowsPerThread * threads) return Split::kRows;
  const double step_work = static_cast<double>(s.batch) * s.hidden * s.hidden;
  if (panels_of<T>(s.hidden) >= threads && step_work >= kStepWorkPerThread * threads) return Split::kColumns;
  return s.batch >= threads ? Split::kRows : Split::kOne;
}

template <typename T>
static int rnn_threads(const RecurrenceSizes<T>& s, int threads) {
  const double work = static_cast<double>(total_rows(s)) * s.hidden * (s.hidden + s.input);
  const double useful = work / kWorkPerThread;
  return useful >= threads ? threads : (useful < 1 ? 1 : static_cast<int>(useful));
}

template <typename T>
static inline bool goes_direct(const RecurrenceSizes<T>& s) {
  return total_rows(s) <= (s.steps <= 2 ? 2 * kDirectRows : kDirectRows);
}

template <typename T>
static int64_t rnn_forward_workspace(const RecurrenceSizes<T>& s) {
  if (goes_direct(s)) return 0;
  return aligned(packed_size<T>(s.hidden, s.input)) + aligned(packed_size<T>(s.hidden, s.hidden));
}

// Elements of both packed factors of a block of the weight gradients.
template <typename T>
constexpr int64_t kGradientBlock = kGradientDepth<T> * (kGradientHeight + kGradientPanels * kPanel<T>);

template <typename T>
static int64_t rnn_backward_workspace(const RecurrenceSizes<T>& s, int threads) {
  return aligned(packed_size<T>(s.hidden, s.hidden)) + aligned(packed_size<T>(s.input, s.hidden)) +
         threads * kGradientBlock<T>;
}

// The steps in the order they run: position i of the order is step index(i).
template <typename T>
struct Order {
  const RecurrenceSizes<T>& s;

  int64_t index(int64_t i) const { return s.reverse ? s.steps - 1 - i : i; }
  int64_t first_row(int64_t i) const { return s.row_offsets[index(i)]; }
  // Rows of position i; none before the first and after the last.
  int64_t rows(int64_t i) const {
    if (i < 0 || i >= s.steps) return 0;
    const int64_t t = index(i);
    return s.row_offsets[t + 1] - s.row_offsets[t];
  }
};

static inline Range intersect(Range a, Range b) {
  const int64_t begin = a.begin > b.begin ? a.begin : b.begin;
  const int64_t end = a.end < b.end ? a.end : b.end;
  return {begin, end > begin ? end : begin};
}

// The first batch row r such that the rows before it hold `share` of all N rows of the sequence. Sequences are sorted
// by falling length, so equal counts of batch rows would be unequal work.
template <typename T>
static int64_t balanced_row(const RecurrenceSizes<T>& s, int rank, int size) {
  if (rank == 0) return 0;
  if (rank == size) return s.batch;
  const int64_t goal = total_rows(s) / size * rank;
  int64_t low = 0, high = s.batch;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    int64_t before = 0;
    for (int64_t t = 0; t < s.steps; ++t) {
      const int64_t rows = s.row_offsets[t + 1] - s.row_offsets[t];
      before += rows < middle ? rows : middle;
    }
    if (before < goal) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// What one thread does of every step.
struct Part {
  Range rows;     // batch rows
  Range panels;   // of the packed recurrent weights
  Range columns;  // what the panels cover
  bool barrier;   // whether to meet the team after each step
};

template <typename T>
static Part part_of(const RecurrenceSizes<T>& s, const Team& team) {
  const int64_t panels = panels_of<T>(s.hidden);
  Part part = {{0, s.batch}, {0, panels}, {0, s.hidden}, false};
  switch (choose_split(s, team.size)) {
    case Split::kRows: {
      const bool even = total_rows(s) == s.steps * s.batch;
      part.rows = even ? team.share(s.batch)
                       : Range{balanced_row(s, team.rank, team.size), balanced_row(s, team.rank + 1, team.size)};
      break;
    }
    case Split::kColumns:
      part.panels = team.share(panels);
      part.columns = intersect({part.panels.begin * kPanel<T>, part.panels.end * kPanel<T>}, {0, s.hidden});
      part.barrier = true;
      break;
    case Split::kOne:
      if (team.rank != 0) part.rows = {0, 0};
      break;
  }
  return part;
}

template <typename T>
static inline void copy_columns(const T* from, T* to, int64_t width, Range rows, Range columns) {
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    __builtin_memcpy(to + r * width + columns.begin, from + r * width + columns.begin, columns.size() * sizeof(T));
  }
}

// A few steps with the weights in their own layout, [H, I] and [H, H]: eight dot products at a time.
template <typename T, typename Cell>
static void forward_direct(const RnnForwardParams<T>& p, const Team& team) {
  constexpr int kDots = 8;
  const RecurrenceSizes<T>& s = p.sizes;
  const Order<T> order{s};
  const Range columns = team.share(s.hidden, kLanes<T>);
  for (int64_t i = 0; i < s.steps; ++i) {
    const int64_t rows = order.rows(i);
    for (int64_t c = columns.begin; c < columns.end; c += kDots) {
      const int64_t count = columns.end - c < kDots ? columns.end - c : kDots;
      for (int64_t r = 0; r < rows; ++r) {
        const T* x = p.x + (order.first_row(i) + r) * s.input;
        const T* h = r < order.rows(i - 1) ? p.y + (order.first_row(i - 1) + r) * s.hidden
                                           : (p.h0 == nullptr ? nullptr : p.h0 + r * s.hidden);
        T z[kLanes<T> > kDots ? kLanes<T> : kDots] = {};
        if (count == kDots) {
          Vec<T> sums[kDots] = {};
          dots<T, kDots>(x, p.w_ih + c * s.input, s.input, sums);
          if (h != nullptr) dots<T, kDots>(h, p.w_hh + c * s.hidden, s.hidden, sums);
          for (int j = 0; j < kDots; ++j) z[j] = sum_lanes<T>(sums[j]);
        } else {
          for (int64_t j = 0; j < count; ++j) {
            Vec<T> sum[1] = {};
            dots<T, 1>(x, p.w_ih + (c + j) * s.input, s.input, sum);
            if (h != nullptr) dots<T, 1>(h, p.w_hh + (c + j) * s.hidden, s.hidden, sum);
            z[j] = sum_lanes<T>(sum[0]);
          }
        }
        T* y = p.y + (order.first_row(i) + r) * s.hidden;
        for (int64_t j = 0; j < count; ++j) {
          if (p.b_ih != nullptr) z[j] += p.b_ih[c + j];
          if (p.b_hh != nullptr) z[j] += p.b_hh[c + j];
        }
        for_each_vector<T>(count, [&](int64_t j, int lanes) {
          store_part(y + c + j, Cell::template activate<T>(load(z + j)), lanes);
        });
      }
    }
    copy_columns(p.y + order.first_row(i) * s.hidden, p.h_n, s.hidden, {order.rows(i + 1), rows}, columns);
    if (i + 1 < s.steps) team.sync();
  }
}

template <typename T, typename Cell>
static void forward_packed(const RnnForwardParams<T>& p, const Team& team) {
  const RecurrenceSizes<T>& s = p.sizes;
  const int64_t H = s.hidden;
  const Order<T> order{s};
  const int64_t panels = panels_of<T>(H);
  T* packed_ih = p.workspace;
  T* packed_hh = packed_ih + aligned(packed_size<T>(H, s.input));

  const Range to_pack = team.share(panels);
  pack_transposed(p.w_ih, H, s.input, to_pack, packed_ih);
  pack_transposed(p.w_hh, H, H, to_pack, packed_hh);
  team.sync();

  const Range rows = team.share(total_rows(s), kRows);
  T* z = p.y + rows.begin * H;
  long_product<T>({p.x + rows.begin * s.input, s.input}, rows.size(), s.input, packed_ih, H,
                  [&](int64_t row, int64_t col, Vec<T> value, int lanes) {
                    if (p.b_ih != nullptr) value += load_part(p.b_ih + col, lanes);
                    if (p.b_hh != nullptr) value += load_part(p.b_hh + col, lanes);
                    store_part(z + row * H + col, value, lanes);
                  });
  team.sync();

  const Part part = part_of(s, team);
  for (int64_t i = 0; i < s.steps; ++i) {
    T* y = p.y + order.first_row(i) * H;
    const int64_t carried = order.rows(i - 1);
    const Range all = intersect(part.rows, {0, order.rows(i)});
    const Range from_y = intersect(all, {0, carried});
    const Range fresh = intersect(all, {carried, order.rows(i)});
    const auto step = [&](const T* previous, Range r) {
      T* out = y + r.begin * H;
      product<T>(
          Rows<T>{previous + r.begin * H, H}, r.size(), H, packed_hh, H, part.panels,
          [&](int64_t row, int64_t col) { __builtin_prefetch(out + row * H + col, 1); },
          [&](int64_t row, int64_t col, Vec<T> value, int lanes) {
            T* target = out + row * H + col;
            store_part(target, Cell::template activate<T>(value + load_part(target, lanes)), lanes);
          });
    };
    if (i > 0) step(p.y + order.first_row(i - 1) * H, from_y);
    if (p.h0 != nullptr) {
      step(p.h0, fresh);
    } else {
      for (int64_t r = fresh.begin; r < fresh.end; ++r) {
        T* target = y + r * H + part.columns.begin;
        for_each_vector<T>(part.columns.size(), [&](int64_t j, int lanes) {
          store_part(target + j, Cell::template activate<T>(load_part(target + j, lanes)), lanes);
        });
      }
    }
    copy_columns(y, p.h_n, H, intersect(all, {order.rows(i + 1), order.rows(i)}), part.columns);
    if (part.barrier) team.sync();
  }
}

// The input of the recurrent product at each row of the sequence: the state before it. Rows are asked for in rising
// order. Null where the state before is zero.
template <typename T>
class PreviousState {
 public:
  PreviousState(const RnnBackwardParams<T>& p, int64_t first) : p_(p), first_(first) {
    const RecurrenceSizes<T>& s = p.sizes;
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

  const T* operator()(int64_t i) {
    const RecurrenceSizes<T>& s = p_.sizes;
    const int64_t row = first_ + i;
    while (row >= s.row_offsets[t_ + 1]) ++t_;
    const int64_t r = row - s.row_offsets[t_];
    const int64_t before = s.reverse ? t_ + 1 : t_ - 1;
    if (before >= 0 && before < s.steps && r < s.row_offsets[before + 1] - s.row_offsets[before]) {
      return p_.y + (s.row_offsets[before] + r) * s.hidden;
    }
    return p_.h0 == nullptr ? nullptr : p_.h0 + r * s.hidden;
  }

 private:
  const RnnBackwardParams<T>& p_;
  int64_t first_;
  int64_t t_ = 0;
};

// dw_ih [H, I] and dw_hh [H, H]: sums over rows i of dz[i]^T times the input and the state before. One product with
// both side by side, so that dz is packed once.
template <typename T>
static void weight_gradients(const RnnBackwardParams<T>& p, T* space, const Team& team) {
  const RecurrenceSizes<T>& s = p.sizes;
  const int64_t H = s.hidden;
  const int64_t n = total_rows(s);
  struct Side {
    T* dw;  // [H, cols]
    int64_t cols;
    Range panels;   // its place among the panels of both
    bool of_state;  // its rows are the states before, not the input
  };
  const int64_t panels_ih = p.dw_ih == nullptr ? 0 : panels_of<T>(s.input);
  const int64_t panels_hh = p.dw_hh == nullptr ? 0 : panels_of<T>(H);
  const Side sides[] = {{p.dw_ih, s.input, {0, panels_ih}, false},
                        {p.dw_hh, H, {panels_ih, panels_ih + panels_hh}, true}};
  Range panels = {0, panels_ih + panels_hh};
  Range heights = {0, H};
  if (panels.end >= 2 * team.size) {
    panels = team.share(panels.end);
  } else {
    heights = team.share(H, kRows);
  }
  if (n == 0) {
    for (const Side& side : sides) {
      const Range part = team.share(side.panels.size() > 0 ? H * side.cols : 0);
      __builtin_memset(side.dw + part.begin, 0, part.size() * sizeof(T));
    }
    return;
  }
  T* right = space;
  T* left = space + kGradientDepth<T> * kGradientPanels * kPanel<T>;
  for (int64_t i = 0; i < n; i += kGradientDepth<T>) {
    const int64_t depth = n - i < kGradientDepth<T> ? n - i : kGradientDepth<T>;
    for (int64_t begin = panels.begin; begin < panels.end; begin += kGradientPanels) {
      const Range group = intersect({begin, begin + kGradientPanels}, panels);
      // Calls body(side, its panels of the group, their first column, their columns, their place in `right`).
      const auto for_each_side = [&](auto body) {
        for (const Side& side : sides) {
          const Range mine = intersect(group, side.panels);
          if (mine.size() == 0) continue;
          const int64_t first = (mine.begin - side.panels.begin) * kPanel<T>;
          const Range columns = intersect({first, first + mine.size() * kPanel<T>}, {0, side.cols});
          body(side, Range{0, mine.size()}, columns, right + (mine.begin - group.begin) * kPanel<T> * depth);
        }
      };
      for_each_side([&](const Side& side, Range some, Range columns, T* packed) {
        for (int64_t j = some.begin; j < some.end; ++j) {
          PreviousState<T> state(p, i);
          const auto row = [&](int64_t k) -> const T* {
            const T* source = side.of_state ? state(k) : p.x + (i + k) * s.input;
            return source == nullptr ? nullptr : source + columns.begin;
          };
          pack_rows<T>(row, columns.size(), depth, {j, j + 1}, packed);
        }
      });
      for (int64_t r = heights.begin; r < heights.end; r += kGradientHeight) {
        const Range height = intersect({r, r + kGradientHeight}, heights);
        pack_columns(p.dz + i * H, H, depth, height, left);
        for_each_side([&](const Side& side, Range some, Range columns, const T* packed) {
          T* target = side.dw + r * side.cols + columns.begin;
          product<T>(
              PackedColumns<T>{left}, height.size(), depth, packed, columns.size(), some,
              [&](int64_t m, int64_t col) { __builtin_prefetch(target + m * side.cols + col, 1); },
              [&](int64_t m, int64_t col, Vec<T> value, int lanes) {
                T* out = target + m * side.cols + col;
                store_part(out, i == 0 ? value : value + load_part(out, lanes), lanes);
              });
        });
      }
    }
  }
}

template <typename T, typename Cell>
static void backward(const RnnBackwardParams<T>& p, const Team& team) {
  const RecurrenceSizes<T>& s = p.sizes;
  const int64_t H = s.hidden;
  const int64_t n = total_rows(s);
  const Order<T> order{s};
  T* packed_hh = p.workspace;
  T* packed_ih = packed_hh + aligned(packed_size<T>(H, H));
  T* space = packed_ih + aligned(packed_size<T>(s.input, H)) + team.rank * kGradientBlock<T>;

  pack_rows<T>([&](int64_t i) { return p.w_hh + i * H; }, H, H, team.share(panels_of<T>(H)), packed_hh);
  if (p.dx != nullptr) {
    pack_rows<T>([&](int64_t i) { return p.w_ih + i * s.input; }, s.input, H, team.share(panels_of<T>(s.input)),
                 packed_ih);
  }
  team.sync();

  const Part part = part_of(s, team);
  // dh of the step before, for rows r of position i: dz_i times the recurrent weights.
  const auto carry = [&](int64_t i, Range r, auto fetch, auto store) {
    product<T>(Rows<T>{p.dz + (order.first_row(i) + r.begin) * H, H}, r.size(), H, packed_hh, H, part.panels, fetch,
               store);
  };
  const auto into_h0 = [&](int64_t i, Range r) {
    if (p.dh0 == nullptr || r.size() == 0) return;
    carry(
        i, r, [](int64_t, int64_t) {},
        [&](int64_t row, int64_t col, Vec<T> value, int lanes) {
          store_part(p.dh0 + (r.begin + row) * H + col, value, lanes);
        });
  };
  for (int64_t i = s.steps - 1; i >= 0; --i) {
    const int64_t offset = order.first_row(i) * H;
    const int64_t later = order.rows(i + 1);
    const Range all = intersect(part.rows, {0, order.rows(i)});
    const auto finish = [&](int64_t at, Vec<T> dh, int lanes) {
      if (p.grad_y != nullptr) dh += load_part(p.grad_y + at, lanes);
      store_part(p.dz + at, Cell::template gate_gradient<T>(dh, load_part(p.y + at, lanes)), lanes);
    };
    const Range going_on = intersect(all, {0, later});
    if (going_on.size() > 0) {
      const int64_t begin = offset + going_on.begin * H;
      carry(
          i + 1, going_on,
          [&](int64_t row, int64_t col) {
            const int64_t at = begin + row * H + col;
            __builtin_prefetch(p.y + at);
            if (p.grad_y != nullptr) __builtin_prefetch(p.grad_y + at);
            __builtin_prefetch(p.dz + at, 1);
          },
          [&](int64_t row, int64_t col, Vec<T> value, int lanes) { finish(begin + row * H + col, value, lanes); });
    }
    const Range ending = intersect(all, {later, order.rows(i)});
    for (int64_t r = ending.begin; r < ending.end; ++r) {
      for_each_vector<T>(part.columns.size(), [&](int64_t j, int lanes) {
        const int64_t at = r * H + part.columns.begin + j;
        finish(offset + at, p.grad_h_n == nullptr ? Vec<T>{} : load_part(p.grad_h_n + at, lanes), lanes);
      });
    }
    into_h0(i + 1, intersect(part.rows, {order.rows(i), later}));  // rows that joined there
    if (part.barrier) team.sync();
  }
  into_h0(0, intersect(part.rows, {0, order.rows(0)}));
  team.sync();

  if (p.dx != nullptr) {
    const Range rows = team.share(n, kRows);
    T* dx = p.dx + rows.begin * s.input;
    long_product<T>(
        {p.dz + rows.begin * H, H}, rows.size(), H, packed_ih, s.input,
        [&](int64_t row, int64_t col, Vec<T> value, int lanes) { store_part(dx + row * s.input + col, value, lanes); });
  }
  if (p.dw_ih != nullptr || p.dw_hh != nullptr) weight_gradients(p, space, team);
  if (p.db != nullptr) {
    constexpr int64_t kSums = 8;
    constexpr int64_t kWidth = kSums * kLanes<T>;
    const Range columns = team.share(H, kLanes<T>);
    for (int64_t c = columns.begin; c < columns.end; c += kWidth) {
      const int64_t width = columns.end - c < kWidth ? columns.end - c : kWidth;
      Vec<T> sums[kSums] = {};
      for (int64_t i = 0; i < n; ++i) {
        for_each_vector<T>(
            width, [&](int64_t j, int lanes) { sums[j / kLanes<T>] += load_part(p.dz + i * H + c + j, lanes); });
      }
      for_each_vector<T>(width, [&](int64_t j, int lanes) { store_part(p.db + c + j, sums[j / kLanes<T>], lanes); });
    }
  }
}

template <typename T, template <Nonlinearity> class Cell, typename Run>
static inline void with_cell(Nonlinearity kind, Run run) {
  switch (kind) {
    case Nonlinearity::kTanh:
      return run(Cell<Nonlinearity::kTanh>{});
    case Nonlinearity::kRelu:
      return run(Cell<Nonlinearity::kRelu>{});
    case Nonlinearity::kSigmoid:
      return run(Cell<Nonlinearity::kSigmoid>{});
  }
}

template <typename T>
static void rnn_forward(const RnnForwardParams<T>& p, const Team& team) {
  with_cell<T, Elman>(p.sizes.nonlinearity, [&](auto cell) {
    if (goes_direct(p.sizes)) {
      forward_direct<T, decltype(cell)>(p, team);
    } else {
      forward_packed<T, decltype(cell)>(p, team);
    }
  });
}

template <typename T>
static void rnn_backward(const RnnBackwardParams<T>& p, const Team& team) {
  with_cell<T, Elman>(p.sizes.nonlinearity, [&](auto cell) { backward<T, decltype(cell)>(p, team); });
}

}  // namespace LLM_EXT_LEVEL
}  // namespace llm_ext
