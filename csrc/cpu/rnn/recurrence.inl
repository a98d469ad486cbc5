// The recurrence over time, generic over the cell.
//
// Tensors are stored as S and computed in T: states and sums are T from step to step even where S has 16 bits, and the
// results are rounded as they are stored. Left factors of products are Factor<S>, packed weights S.
//
// Forward: with the weights packed, a block of steps at a time, one product for the input projection and the loop over
// time, which turns pre-activations into states. Backward: the loop over time backwards for dz, and after each block of
// steps its products: dx, and its part of the gradients of the weights. docs/recurrence.md derives it.
namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Up to so many rows of the sequence (four times as many in one or two steps), weights are read in their own layout
// instead of being packed first. GRU of I = 256, H = 512, a step of 64 rows on Zen 5 goes at 440 GFLOP/s either way if
// packed weights are remembered, and at half of that where they are not.
constexpr int64_t kDirectRows = 16;
// Multiply-adds of one step that repay a barrier, some 0.3 us. B1 H128 (16 thousand) takes 0.8 us with it and 1.0
// without.
constexpr double kStepWorkPerThread = 8.0e3;
// Fewer rows a thread than this leave the micro-kernel starved for loads: split the columns instead. B4 H512 on two
// threads takes 25 us a step by columns and 34 by rows, B8 the same either way. Weights of the state up to so many
// bytes are read so quickly that one row less will do: B6, LSTM of H = 34 2.2 us a step by columns and 1.6 by rows, of
// H = 128 10.7 either way, of H = 512 148 and 165; Elman of H = 128 2.9 and 2.5. Weights of more than so many do not
// stay in a second-level cache, and are better read half by each of two threads. On Zen 5 at B16, by columns and by
// rows, LSTM of H = 512 72 and 77 us, GRU 54 and 57, Elman of H = 1024 69 and 73; at B24 the same either way.
constexpr int64_t kRowsPerThread = 4;
constexpr int64_t kNearBytes = 256 << 10;
constexpr int64_t kRowsPerThreadFar = 9;
constexpr int64_t kOutOfCacheBytes = 3 << 19;
// Pre-activations of so many bytes are computed ahead of the loop, and of so many rows at least.
constexpr int64_t kBlockBytesOfSteps = 2 << 20;
constexpr int64_t kBlockRows = 192;
// Workspace pieces start on a cache line.
constexpr int64_t kAlign = 64;

static inline int64_t aligned(int64_t elements) { return divide_up(elements, kAlign) * kAlign; }

// How a team shares the loop over time.
enum class Split {
  kRows,     // each thread runs its own batch rows; no barrier
  kColumns,  // each thread computes its own columns of every step; a barrier each step
  kOne       // too little work in a step to share: one thread runs it
};

static inline int64_t total_rows(const RecurrenceSizes& s) { return s.row_offsets[s.steps]; }

// Whether all sequences are as long as the longest.
static inline bool of_one_length(const RecurrenceSizes& s) { return total_rows(s) == s.steps * s.batch; }

// Multiply-adds of a row in one step.
static inline double row_work(const RecurrenceSizes& s) {
  const double gates = static_cast<double>(gates_of(s.mode)) * s.hidden * s.output;
  return s.projected() ? gates + static_cast<double>(s.hidden) * s.output : gates;
}

template <typename S>
static inline Split choose_split(const RecurrenceSizes& s, int threads) {
  if (threads == 1) return Split::kOne;
  // Where sequences end early, rows would leave each thread fewer and fewer of them, tiles that starve the
  // micro-kernel. T128 B32 I256 H512 with lengths from T / 4 to T takes 13.7 ms by rows and 11.6 by columns (LSTM 57
  // and 48).
  const double bytes = row_work(s) * sizeof(S);
  const int64_t rows = bytes > kOutOfCacheBytes ? kRowsPerThreadFar : kRowsPerThread - (bytes <= kNearBytes);
  if (of_one_length(s) && s.batch >= rows * threads) return Split::kRows;
  if (panels_of<Compute<S>>(s.hidden) >= threads && s.batch * row_work(s) >= kStepWorkPerThread * threads)
    return Split::kColumns;
  return s.batch >= threads ? Split::kRows : Split::kOne;
}

static int recurrence_threads(const RecurrenceSizes& s, int threads) {
  const double projection = static_cast<double>(gates_of(s.mode)) * s.hidden * s.input;
  return threads_worth(total_rows(s) * (row_work(s) + projection), kWorkPerThread, threads);
}

// Recurrences that a thread each runs meet no barrier, but each thread reads a whole U. Two layers, T256 on 2 cores of
// a Zen 3, a thread each against one after the other, H64, H128, H256: Elman B1 1.5, 1.4, 1.8 times as quick,
// B4 1.2, 1.15, 0.95; LSTM B1 1.1, 1.0, 0.7, B4 1.2, 1.05, 0.9.
template <typename S>
static bool one_thread_per_recurrence(const RecurrenceSizes& s, int recurrences, int threads) {
  const double useful = s.batch * row_work(s) / kStepWorkPerThread;
  const bool near = row_work(s) * sizeof(S) <= kNearBytes;
  return near && threads > 1 && recurrences > 1 && recurrence_threads(s, 2) > 1 &&
         s.batch < (kRowsPerThread - 1) * threads && (recurrences >= threads || recurrences >= useful);
}

static inline bool goes_direct(const RecurrenceSizes& s) {
  return !s.projected() && total_rows(s) <= (s.steps <= 2 ? 4 * kDirectRows : kDirectRows);
}

// Rows of a block of steps: so many, but at least one step.
template <typename T>
static inline int64_t block_rows(const RecurrenceSizes& s) {
  const int64_t rows = kBlockBytesOfSteps / static_cast<int64_t>(sizeof(T)) / (gates_of(s.mode) * s.hidden + 1);
  const int64_t fitting = rows > kBlockRows ? rows : kBlockRows;
  return fitting > s.batch ? fitting : s.batch;
}

// Rows that a block of steps has at most.
template <typename T>
static inline int64_t most_block_rows(const RecurrenceSizes& s) {
  return block_rows<T>(s) < total_rows(s) ? block_rows<T>(s) : total_rows(s);
}

// Elements of T that hold n of F.
template <typename T, typename F>
static inline int64_t space_of(int64_t n) {
  return aligned(divide_up(n * static_cast<int64_t>(sizeof(F)), sizeof(T)));
}

// Where the packed weights of a forward pass lie. Sizes in elements of R.
template <typename R>
struct PackedWeights {
  explicit PackedWeights(const RecurrenceSizes& s)
      : ih(aligned(packed_size<R>(gates_of(s.mode) * s.hidden, s.input))),
        hh_gate(aligned(packed_size<R>(s.hidden, s.output))),
        hr(s.projected() ? aligned(packed_size<R>(s.output, s.hidden)) : 0),
        total(ih + gates_of(s.mode) * hh_gate + hr) {}

  int64_t ih;       // those of the input
  int64_t hh_gate;  // of the state, a gate
  int64_t hr;       // of the projection
  int64_t total;
};

template <typename S>
static int64_t packed_weights_size(const RecurrenceSizes& s) {
  return goes_direct(s) ? 0 : PackedWeights<S>(s).total * sizeof(S);
}

// Where the forward pass puts what, besides its results. Sizes in elements of T.
template <typename S, typename T = Compute<S>>
struct ForwardSpace {
  ForwardSpace(const RecurrenceSizes& s, int threads)
      : bias(aligned(gates_of(s.mode) * s.hidden)),
        z(gates_of(s.mode) > 1 || kIsNarrow<S> ? aligned(most_block_rows<T>(s) * gates_of(s.mode) * s.hidden) : 0),
        m(s.projected() ? space_of<T, Factor<S>>(s.batch * s.hidden) : 0),
        states(kIsNarrow<S> ? aligned(2 * s.batch * s.output) : 0),
        cells(kIsNarrow<S> && s.mode == Mode::kLstm ? aligned(s.batch * s.hidden) : 0),
        left(kSame<Factor<S>, S> ? 0 : aligned(rows_of_block<T>(s.input) * s.input)),
        total(bias + z + m + states + cells + threads * left) {}

  int64_t bias;    // of the input's blocks
  int64_t z;       // pre-activations of a block of steps, where no array that is returned holds them
  int64_t m;       // output of a step before the projection, likewise
  int64_t states;  // the states of two steps, where y does not hold them as T
  int64_t cells;   // cell states, where c_n does not hold them as T
  int64_t left;    // of each thread, a block of rows of the input, where x does not hold them as factors
  int64_t total;
};

template <typename S>
static int64_t recurrence_forward_workspace(const RecurrenceSizes& s, int threads) {
  const ForwardSpace<S> space(s, threads);
  return goes_direct(s) ? space.states + space.cells : space.total;
}

// Where the backward pass puts what, besides its results. Sizes in elements of T.
template <typename S, typename T = Compute<S>>
struct BackwardSpace {
  BackwardSpace(const RecurrenceSizes& s, int threads)
      : hh(space_of<T, S>(packed_size<S>(s.output, gates_of(s.mode) * s.hidden))),
        hr(s.projected() ? space_of<T, S>(packed_size<S>(s.hidden, s.output)) : 0),
        ih(space_of<T, S>(packed_size<S>(s.input, gates_of(s.mode) * s.hidden))),
        carry(gates_of(s.mode) > 1 ? aligned(s.batch * s.hidden) : 0),
        dh(s.projected() ? space_of<T, Factor<S>>(most_rows(s) * s.output) : 0),
        dz(space_of<T, Factor<S>>(most_rows(s) * blocks_of(s.mode) * s.hidden)),
        sums(kIsNarrow<S> ? aligned(gradients(s)) : 0),
        block(space_of<T, Factor<S>>(kGradientBlock<T>)),
        total(hh + hr + ih + carry + dh + 2 * dz + sums + threads * block) {}

  // Rows of a block of steps: what the weight gradients take at a time, but at least one step.
  static int64_t most_rows(const RecurrenceSizes& s) {
    const int64_t rows = total_rows(s) < kGradientDepth<T> ? total_rows(s) : kGradientDepth<T>;
    return rows > s.batch ? rows : s.batch;
  }
  static int64_t gradients(const RecurrenceSizes& s) {
    return gates_of(s.mode) * s.hidden * (s.input + s.output + 2) + (s.projected() ? s.output * s.hidden : 0);
  }

  int64_t hh;     // packed weights of the state
  int64_t hr;     // of the projection
  int64_t ih;     // of the input
  int64_t carry;  // what passes from step to step besides the product
  int64_t dh;     // gradients of the states of a block of steps, where they are projected
  int64_t dz;     // gradients of the pre-activations of a block of steps
  int64_t sums;   // gradients of weights and biases, where the results do not hold them as T
  int64_t block;  // of each thread, a block of the weight gradients
  int64_t total;
};

template <typename S>
static int64_t recurrence_backward_workspace(const RecurrenceSizes& s, int threads) {
  return BackwardSpace<S>(s, threads).total;
}

// The steps in the order they run: position i of the order is step index(i).
struct Order {
  const RecurrenceSizes& s;

  int64_t index(int64_t i) const { return s.reverse ? s.steps - 1 - i : i; }
  int64_t first_row(int64_t i) const { return s.row_offsets[index(i)]; }
  // Rows of position i; none before the first and after the last.
  int64_t rows(int64_t i) const {
    if (i < 0 || i >= s.steps) return 0;
    const int64_t t = index(i);
    return s.row_offsets[t + 1] - s.row_offsets[t];
  }
};

// The first batch row r such that the rows before it hold `share` of all N rows of the sequence. Sequences are sorted
// by falling length, so equal counts of batch rows would be unequal work.
static int64_t balanced_row(const RecurrenceSizes& s, int rank, int size) {
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
  Range rows;            // batch rows
  Range panels;          // of H columns: its units
  Range columns;         // what these panels cover
  Range output_panels;   // of P columns; the same unless the output is projected
  Range output_columns;  // what these panels cover
  bool barrier;          // whether to meet the team after each step
};

template <typename T>
static inline Range columns_of(Range panels, int64_t cols) {
  return intersect({panels.begin * kPanel<T>, panels.end * kPanel<T>}, {0, cols});
}

template <typename S>
static Part part_of(const RecurrenceSizes& s, const ThreadTeam& team) {
  using T = Compute<S>;
  Part part = {{0, s.batch}, {0, panels_of<T>(s.hidden)}, {}, {0, panels_of<T>(s.output)}, {}, false};
  switch (choose_split<S>(s, team.size)) {
    case Split::kRows:
      part.rows = of_one_length(s)
                      ? team.share(s.batch)
                      : Range{balanced_row(s, team.rank, team.size), balanced_row(s, team.rank + 1, team.size)};
      break;
    case Split::kColumns:
      part.panels = team.share(part.panels.end);
      part.output_panels = team.share(part.output_panels.end);
      part.barrier = true;
      break;
    case Split::kOne:
      if (team.rank != 0) part.rows = {0, 0};
      break;
  }
  part.columns = columns_of<T>(part.panels, s.hidden);
  part.output_columns = columns_of<T>(part.output_panels, s.output);
  return part;
}

template <typename From, typename To>
static inline void copy_columns(const From* from, To* to, int64_t width, Range rows, Range columns) {
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    convert(from + r * width + columns.begin, to + r * width + columns.begin, columns.size());
  }
}

// The same; zeros where there is nothing to copy from.
template <typename From, typename To>
static inline void start_columns(const From* from, To* to, int64_t width, Range rows, Range columns) {
  if (from != nullptr) return copy_columns(from, to, width, rows, columns);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    __builtin_memset(to + r * width + columns.begin, 0, columns.size() * sizeof(To));
  }
}

// One step of some units of one row: `blocks` holds their pre-activations, the other pointers are at the first of the
// units. h_before: null for zeros. saved: blocks `hidden` apart, null: not wanted. Returns the output.
template <typename S, typename C, typename T = Compute<S>>
static inline Vec<T> forward_units(Vec<T> (&blocks)[C::kBlocks], const T* h_before, T* c, S* saved, int64_t hidden,
                                   int lanes) {
  Vec<T> before{}, cell{};
  if (C::kReadsState && h_before != nullptr) before = load_part(h_before, lanes);
  if (C::kHasCell) cell = load_part(c, lanes);
  const Vec<T> h = C::template forward<T>(blocks, before, cell);
  if (C::kHasCell) store_part(c, cell, lanes);
  if (C::kKeeps && saved != nullptr) {
    for (int b = 0; b < C::kBlocks; ++b) store_part(saved + b * hidden, blocks[b], lanes);
    if (C::kHasCell) store_part(saved + C::kBlocks * hidden, cell, lanes);
  }
  return h;
}

// The states as they pass from step to step, as T: those of the cell in c_n and all others in y, or where these are
// narrower in pieces of workspace, beside which results are stored.
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

  // Before the first step. A row that joins later starts from what both places hold.
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

  // That of a row before position i; null: zeros. Rows that go on are P apart, and so are rows that join.
  const T* before(int64_t i, int64_t r) const {
    if constexpr (kIsNarrow<S>) {
      return r >= order_.rows(i - 1) && p_.h0 == nullptr ? nullptr : place(i + 1, r);
    } else {
      return stored_before(i, r);
    }
  }

  // The same, as the products read it.
  const Factor<S>* factor_before(int64_t i, int64_t r) const {
    if constexpr (kSame<Factor<S>, S>) {
      return stored_before(i, r);
    } else {
      return before(i, r);
    }
  }

  T* cell(int64_t r, int64_t col) const { return C::kHasCell ? cells_ + r * s_.hidden + col : nullptr; }

  // Where the states of a position go: into y, and where they pass on from.
  struct Target {
    S* y;
    T* next;
    int64_t width;

    void store(int64_t r, int64_t col, Vec<T> h, int lanes) const {
      store_part(y + r * width + col, h, lanes);
      if constexpr (kIsNarrow<S>) store_part(next + r * width + col, h, lanes);
    }
  };
  Target target(int64_t i) const { return {p_.y + order_.first_row(i) * s_.output, place(i, 0), s_.output}; }

  // After position i: the last states of rows that end there.
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

  T* place(int64_t i, int64_t r) const {
    return kIsNarrow<S> ? two_steps_ + (i % 2 * s_.batch + r) * s_.output : nullptr;
  }

  const RecurrenceForwardParams<S>& p_;
  const RecurrenceSizes& s_ = p_.sizes;
  const Order order_{s_};
  T* const two_steps_;
  T* cells_;
};

// A few rows with the weights in their own layout, [G H, I] and [G H, H]: a vector of units at a time.
template <typename S, typename C>
static void forward_direct(const RecurrenceForwardParams<S>& p, const ThreadTeam& team) {
  using T = Compute<S>;
  const RecurrenceSizes& s = p.sizes;
  const int64_t H = s.hidden;
  const int64_t saved_width = saved_blocks(s.mode, false) * H;
  const Order order{s};
  const Range columns = team.share(H, kLanes<T>);
  const Range all = {0, s.batch};
  const States<S, C> states(p, p.workspace, p.workspace + ForwardSpace<S>(s, team.size).states);
  states.start(all, columns, columns);
  if (kIsNarrow<S>) team.sync();
  for (int64_t i = 0; i < s.steps; ++i) {
    const auto target = states.target(i);
    const int64_t first_row = order.first_row(i);
    // Rows that all go on, or all join.
    const auto step = [&](Range rows) {
      if (rows.size() == 0) return;
      const S* x = p.x + (first_row + rows.begin) * s.input;
      const T* h = states.before(i, rows.begin);
      const Tiles tiles(rows.size(), kDotRows, kDotRows);
      for_each_vector<T>(columns.size(), [&](int64_t j, int lanes) {
        const int64_t col = columns.begin + j;
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
          const Range part = tiles[tile];
          Vec<T> z[C::kBlocks][kDotRows];
          for (int b = 0; b < C::kBlocks; ++b) {
            DotFactors<S, S> input{};
            DotFactors<T, S> state{};
            if (b < C::kGates) input = {x, s.input, p.w_ih + (input_gate<C>(b) * H + col) * s.input, s.input, s.input};
            if (state_gate<C>(b) >= 0 && h != nullptr) state = {h, H, p.w_hh + (state_gate<C>(b) * H + col) * H, H, H};
            row_dots<T>(input.rows_from(part.begin), state.rows_from(part.begin), part.size(), lanes, z[b]);
          }
          for (int64_t m = part.begin; m < part.end; ++m) {
            const int64_t r = rows.begin + m;
            Vec<T> blocks[C::kBlocks];
            for (int b = 0; b < C::kBlocks; ++b) {
              blocks[b] = z[b][m - part.begin];
              const int64_t in = input_gate<C>(b) * H + col, hidden = state_gate<C>(b) * H + col;
              if (b < C::kGates && p.b_ih != nullptr) blocks[b] += load_part(p.b_ih + in, lanes);
              if (b < C::kGates && p.input_projections != nullptr) {
                blocks[b] += load_part(p.input_projections + p.input_ids[first_row + r] * C::kGates * H + in, lanes);
              }
              if (state_gate<C>(b) >= 0 && p.b_hh != nullptr) blocks[b] += load_part(p.b_hh + hidden, lanes);
            }
            const Vec<T> h_now = forward_units<S, C>(
                blocks, h == nullptr ? nullptr : h + m * H + col, states.cell(r, col),
                p.saved == nullptr ? nullptr : p.saved + (first_row + r) * saved_width + col, H, lanes);
            target.store(r, col, h_now, lanes);
          }
        }
      });
    };
    const Range now = {0, order.rows(i)};
    step(intersect(now, {0, order.rows(i - 1)}));
    step(intersect(now, {order.rows(i - 1), order.rows(i)}));
    states.end(i, all, columns);
    if (i + 1 < s.steps) team.sync();
  }
  states.finish(all, columns);
}

template <typename S>
static void pack_weights(const RecurrenceForwardParams<S>& p, void* place, const ThreadTeam& team) {
  using T = Compute<S>;
  using R = S;
  R* const packed = static_cast<R*>(place);
  with_cell(p.sizes.mode, [&](auto cell) {
    using C = decltype(cell);
    const RecurrenceSizes& s = p.sizes;
    const int64_t H = s.hidden, P = s.output;
    const int64_t gates = C::kGates * H;
    const PackedWeights<R> sizes(s);
    pack_transposed([&](int64_t col) { return p.w_ih + (input_gate<C>(col / H) * H + col % H) * s.input; }, gates,
                    s.input, team.share(panels_of<T>(gates)), packed);
    for (int g = 0; g < C::kGates; ++g) {
      pack_transposed([&](int64_t col) { return p.w_hh + (g * H + col) * P; }, H, P, team.share(panels_of<T>(H)),
                      packed + sizes.ih + g * sizes.hh_gate);
    }
    if (s.projected()) {
      pack_transposed([&](int64_t col) { return p.w_hr + col * H; }, P, H, team.share(panels_of<T>(P)),
                      packed + sizes.ih + C::kGates * sizes.hh_gate);
    }
  });
}

template <typename S, typename C>
static void forward_packed(const RecurrenceForwardParams<S>& p, const ThreadTeam& team) {
  using T = Compute<S>;
  using R = S;
  using L = Factor<S>;
  const RecurrenceSizes& s = p.sizes;
  const int64_t H = s.hidden, P = s.output;
  const int64_t gates = C::kGates * H;
  const bool projected = C::kHasCell && s.projected();
  const Order order{s};
  const PackedWeights<R> weights(s);
  const R* packed_ih = static_cast<const R*>(p.packed);
  const R* packed_hh = packed_ih + weights.ih;
  const R* packed_hr = packed_hh + C::kGates * weights.hh_gate;
  const ForwardSpace<S> space(s, team.size);
  T* bias = p.workspace;
  T* block_z = bias + space.bias;
  L* step_m = reinterpret_cast<L*>(block_z + space.z);
  T* two_steps = block_z + space.z + space.m;
  T* cells = two_steps + space.states;
  L* left = reinterpret_cast<L*>(cells + space.cells + team.rank * space.left);

  const Range biases = team.share(gates, kAlign);
  for (int64_t j = biases.begin; j < biases.end; ++j) {
    const int b = static_cast<int>(j / H);
    bias[j] = p.b_ih == nullptr ? T(0) : read(p.b_ih + input_gate<C>(b) * H + j % H);
    if (state_gate<C>(b) >= 0 && p.b_hh != nullptr) bias[j] += read(p.b_hh + state_gate<C>(b) * H + j % H);
  }

  const Part part = part_of<S>(s, team);
  const States<S, C> states(p, two_steps, cells);
  states.start(part.rows, part.columns, part.output_columns);
  const int64_t saved_width = saved_blocks(s.mode, projected) * H;
  // Pre-activations go where their gates will be saved, or the states be written; else where the next block's will, too.
  T* z_home = nullptr;
  if constexpr (!kIsNarrow<S>) z_home = !C::kKeeps ? p.y : p.saved;
  const int64_t z_width = z_home == nullptr ? gates : (C::kKeeps ? saved_width : H);
  const int64_t limit = block_rows<T>(s);
  const auto table_row = [&](int64_t row) { return p.input_projections == nullptr ? nullptr : p.input_projections + p.input_ids[row] * gates; };

  for (int64_t begin = 0, end = 0; begin < s.steps; begin = end) {
    int64_t count = 0;
    do count += order.rows(end++);
    while (end < s.steps && count + order.rows(end) <= limit);
    const int64_t first = s.reverse ? order.first_row(end - 1) : order.first_row(begin);
    T* const z = z_home == nullptr ? block_z : z_home + first * z_width;

    team.sync();
    if (p.input_projections == nullptr) {
      const Range rows = team.share(count, kRows);
      long_product(p.x + (first + rows.begin) * s.input, s.input, rows.size(), s.input, packed_ih, gates, left,
                   [&](int64_t row, int64_t col, Vec<T> value, int lanes) {
                     store_part(z + (rows.begin + row) * z_width + col, value + load_part(bias + col, lanes), lanes);
                   });
      team.sync();
    }

    for (int64_t i = begin; i < end; ++i) {
      const int64_t first_row = order.first_row(i);
      const Range all = intersect(part.rows, {0, order.rows(i)});
      const auto target = states.target(i);
      S* const saved = p.saved == nullptr ? nullptr : p.saved + first_row * saved_width;
      // The output of the cell, where it is not yet that of the step; what is saved of it may be the same.
      S* const saved_m = saved == nullptr ? nullptr : saved + (C::kBlocks + 1) * H;
      L* m = step_m;
      int64_t m_width = H;
      if constexpr (!kIsNarrow<S>) {
        if (saved_m != nullptr) m = saved_m, m_width = saved_width;
      }
      const auto finish = [&](const T* previous, int64_t r, int64_t col, Vec<T>(&values)[C::kGates], int lanes) {
        const T* z_row = z + (first_row - first + r) * z_width + col;
        const S* given = table_row(first_row + r);
        Vec<T> blocks[C::kBlocks];
        for (int b = 0; b < C::kBlocks; ++b) {
          const int g = state_gate<C>(b);
          if (b < C::kGates) {
            if (given == nullptr) {
              blocks[b] = load_part(z_row + b * H, lanes);
            } else {
              blocks[b] = load_part(given + input_gate<C>(b) * H + col, lanes) + load_part(bias + b * H + col, lanes);
            }
            if (g >= 0) blocks[b] += values[g];
          } else {
            blocks[b] = values[g];
            if (p.b_hh != nullptr) blocks[b] += load_part(p.b_hh + g * H + col, lanes);
          }
        }
        const Vec<T> h =
            forward_units<S, C>(blocks, previous == nullptr ? nullptr : previous + col, states.cell(r, col),
                                saved == nullptr ? nullptr : saved + r * saved_width + col, H, lanes);
        if (!projected) return target.store(r, col, h, lanes);
        store_part(m + r * m_width + col, h, lanes);
        if constexpr (kIsNarrow<S>) {
          if (saved_m != nullptr) store_part(saved_m + r * saved_width + col, h, lanes);
        }
      };
      // Rows that all go on, or all join.
      const auto step = [&](Range r) {
        if (r.size() == 0) return;
        const T* previous = states.before(i, r.begin);
        const L* factor = states.factor_before(i, r.begin);
        if (factor == nullptr) {
          for (int64_t row = r.begin; row < r.end; ++row) {
            for_each_vector<T>(part.columns.size(), [&](int64_t j, int lanes) {
              Vec<T> zeros[C::kGates] = {};
              finish(nullptr, row, part.columns.begin + j, zeros, lanes);
            });
          }
          return;
        }
        gates_product<C::kGates>(
            Rows<L>{factor, P}, r.size(), P, packed_hh, weights.hh_gate, H, Panels{part.panels, i % 2 != 0},
            [&](int64_t row, int64_t col) {
              if (const S* given = table_row(first_row + r.begin + row); given != nullptr) {
                for (int b = 0; b < C::kGates; ++b) __builtin_prefetch(given + b * H + col);
                return;
              }
              const T* z_row = z + (first_row - first + r.begin + row) * z_width + col;
              for (int b = 0; b < C::kGates; ++b) __builtin_prefetch(z_row + b * H, 1);
            },
            [&](int64_t row, int64_t col, Vec<T>(&values)[C::kGates], int lanes) {
              finish(previous + row * P, r.begin + row, col, values, lanes);
            });
      };
      step(intersect(all, {0, order.rows(i - 1)}));
      step(intersect(all, {order.rows(i - 1), order.rows(i)}));
      if (projected) {
        if (part.barrier) team.sync();
        product(
            Rows<L>{m + all.begin * m_width, m_width}, all.size(), H, packed_hr, P,
            Panels{part.output_panels, i % 2 != 0}, [](int64_t, int64_t) {},
            [&](int64_t row, int64_t col, Vec<T> value, int lanes) {
              target.store(all.begin + row, col, value, lanes);
            });
      }
      states.end(i, part.rows, part.output_columns);
      if (part.barrier) team.sync();
    }
  }
  states.finish(part.rows, part.columns);
}

// The input of the recurrent product at each row of the sequence: the state before it. Rows are asked for in rising
// order. Null where the state before is zero.
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

// The backward pass, as one thread of the team sees it.
template <typename S, typename C>
class BackwardPass {
  using T = Compute<S>;
  using R = S;
  using L = Factor<S>;

 public:
  BackwardPass(const RecurrenceBackwardParams<S>& p, const ThreadTeam& team)
      : p_(p), team_(team), part_(part_of<S>(p.sizes, team)), projected_(C::kHasCell && p.sizes.projected()) {
    const BackwardSpace<S> sizes(s_, team.size);
    T* place = p.workspace;
    const auto take = [&](int64_t elements) {
      T* taken = place;
      place += elements;
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
    space_ = reinterpret_cast<L*>(place + team.rank * sizes.block);
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
    if (C::kCarries) start_columns(p_.grad_c_n, carry_, H, part_.rows, part_.columns);
    team_.sync();
    do {
      begin_block();
      for (int64_t i = block_.steps.end - 1; i >= block_.steps.begin; --i) step(i);
      team_.sync();
      products();
      // dh has one place only: nobody may write the next block's while it is read.
      if (projected_) team_.sync();
    } while (block_.steps.begin > 0);
    into_h0(0, intersect(part_.rows, {0, order_.rows(0)}));
    if (p_.dc0 != nullptr) copy_columns(carry_, p_.dc0, H, part_.rows, part_.columns);
    if constexpr (kIsNarrow<S>) {
      team_.sync();
      for_each_gradient([&](T*& sum, S* result, int64_t n) {
        const Range part = team_.share(n, kLanes<T>);
        if (result != nullptr) convert(sum + part.begin, result + part.begin, part.size());
      });
    }
  }

 private:
  // A block of steps, whose rows are neighbours.
  struct Block {
    L* dz;          // [rows, blocks H]
    int64_t first;  // its first row of the sequence
    int64_t rows;
    Range steps;  // its positions in the order
  };

  // Calls body(its sum, the result, elements) for each gradient of weights and biases.
  template <typename Body>
  void for_each_gradient(Body body) {
    body(dw_ih_, p_.dw_ih, gates_ * s_.input);
    body(dw_hh_, p_.dw_hh, gates_ * P);
    body(dw_hr_, p_.dw_hr, projected_ ? P * H : 0);
    body(db_ih_, p_.db_ih, gates_);
    body(db_hh_, p_.db_hh, gates_);
  }

  void pack() {
    pack_rows([&](int64_t i) { return p_.w_hh + i * P; }, P, gates_, team_.share(panels_of<T>(P)), packed_hh_);
    if (projected_) {
      pack_rows([&](int64_t i) { return p_.w_hr + i * H; }, H, P, team_.share(panels_of<T>(H)), packed_hr_);
    }
    if (p_.dx != nullptr) {
      pack_rows([&](int64_t i) { return p_.w_ih + (input_gate<C>(i / H) * H + i % H) * s_.input; }, s_.input, gates_,
                team_.share(panels_of<T>(s_.input)), packed_ih_);
    }
  }

  // The steps before the block: what the weight gradients take at a time, but one at least.
  void begin_block() {
    Block next = {later_block_.dz, 0, 0, {block_.steps.begin, block_.steps.begin}};
    while (next.steps.begin > 0) {
      const int64_t more = order_.rows(next.steps.begin - 1);
      if (next.rows > 0 && next.rows + more > kGradientDepth<T>) break;
      next.rows += more;
      --next.steps.begin;
    }
    if (next.rows > 0) next.first = order_.first_row(s_.reverse ? next.steps.end - 1 : next.steps.begin);
    later_block_ = block_;
    block_ = next;
  }

  // Position i, batch row r. The step after the block's last is the first of the block that was at work before.
  L* dz_of(int64_t i, int64_t r) const {
    const Block& block = i < block_.steps.end ? block_ : later_block_;
    return block.dz + (order_.first_row(i) + r - block.first) * dz_width_;
  }
  L* dh_of(int64_t i, int64_t r) const { return dh_ + (order_.first_row(i) + r - block_.first) * P; }

  // The state of a row before position i; null: zeros.
  const S* state_before(int64_t i, int64_t r) const {
    if (r < order_.rows(i - 1)) return p_.y + (order_.first_row(i - 1) + r) * P;
    return p_.h0 == nullptr ? nullptr : p_.h0 + r * P;
  }
  const S* cell_before(int64_t i, int64_t r) const {
    if (r < order_.rows(i - 1)) return p_.saved + (order_.first_row(i - 1) + r) * saved_width_ + C::kBlocks * H;
    return p_.c0 == nullptr ? nullptr : p_.c0 + r * H;
  }

  // From the whole gradient of some units' output to those of their pre-activations.
  void through_cell(int64_t i, int64_t r, int64_t col, Vec<T> dh, int lanes) {
    const int64_t row = order_.first_row(i) + r;
    Vec<T> blocks[C::kBlocks];
    Vec<T> h{}, h_before{}, c{}, c_before{}, carried{};
    if (C::kKeeps) {
      const S* saved = p_.saved + row * saved_width_ + col;
      for (int b = 0; b < C::kBlocks; ++b) blocks[b] = load_part(saved + b * H, lanes);
      if (C::kHasCell) c = load_part(saved + C::kBlocks * H, lanes);
    } else {
      h = load_part(p_.y + row * P + col, lanes);
    }
    if (C::kReadsState) {
      const S* before = state_before(i, r);
      if (before != nullptr) h_before = load_part(before + col, lanes);
    }
    if (C::kHasCell) {
      const S* before = cell_before(i, r);
      if (before != nullptr) c_before = load_part(before + col, lanes);
    }
    if (C::kCarries) carried = load_part(carry_ + r * H + col, lanes);
    C::template backward<T>(blocks, h, h_before, c, c_before, dh, carried);
    if (C::kCarries) store_part(carry_ + r * H + col, carried, lanes);
    L* dz = dz_of(i, r) + col;
    for (int b = 0; b < C::kBlocks; ++b) store_part(dz + b * H, blocks[b], lanes);
  }

  // From what later steps give to a state to its whole gradient, and on, unless the output is projected.
  void finish(int64_t i, int64_t r, int64_t col, Vec<T> dh, int lanes) {
    if (p_.grad_y != nullptr) dh += load_part(p_.grad_y + (order_.first_row(i) + r) * P + col, lanes);
    if (projected_) {
      store_part(dh_of(i, r) + col, dh, lanes);
    } else {
      through_cell(i, r, col, dh, lanes);
    }
  }

  // dz of position i times the weights of the state, for rows r. They see its last blocks.
  template <typename Fetch, typename Store>
  void to_state(int64_t i, Range r, Fetch fetch, Store store) {
    product(Rows<L>{dz_of(i, r.begin) + dz_width_ - gates_, dz_width_}, r.size(), gates_, packed_hh_, P,
            Panels{part_.output_panels, i % 2 != 0}, fetch, store);
  }

  void into_h0(int64_t i, Range r) {
    if (p_.dh0 == nullptr || r.size() == 0) return;
    to_state(
        i, r, [](int64_t, int64_t) {},
        [&](int64_t row, int64_t col, Vec<T> value, int lanes) {
          const int64_t at = (r.begin + row) * P + col;
          if (C::kCarries && !C::kHasCell) value += load_part(carry_ + at, lanes);
          store_part(p_.dh0 + at, value, lanes);
        });
  }

  // Asks for all that finish() will need of a row from a column on.
  void fetch(int64_t i, int64_t r, int64_t col) {
    const int64_t row = order_.first_row(i) + r;
    if (p_.grad_y != nullptr) __builtin_prefetch(p_.grad_y + row * P + col);
    if (projected_) return;
    if (!C::kKeeps) __builtin_prefetch(p_.y + row * P + col);
    for (int b = 0; b < saved_blocks(C::kMode, false); ++b) {
      __builtin_prefetch(p_.saved + row * saved_width_ + b * H + col);
    }
    const L* dz = dz_of(i, r) + col;
    for (int b = 0; b < C::kBlocks; ++b) __builtin_prefetch(dz + b * H, 1);
  }

  void step(int64_t i) {
    const int64_t later = order_.rows(i + 1);
    const Range all = intersect(part_.rows, {0, order_.rows(i)});
    const Range going_on = intersect(all, {0, later});
    if (going_on.size() > 0) {
      to_state(
          i + 1, going_on, [&](int64_t m, int64_t col) { fetch(i, going_on.begin + m, col); },
          [&](int64_t m, int64_t col, Vec<T> value, int lanes) { finish(i, going_on.begin + m, col, value, lanes); });
    }
    const Range ending = intersect(all, {later, order_.rows(i)});
    for (int64_t r = ending.begin; r < ending.end; ++r) {
      for_each_vector<T>(part_.output_columns.size(), [&](int64_t j, int lanes) {
        const int64_t col = part_.output_columns.begin + j;
        finish(i, r, col, p_.grad_h_n == nullptr ? Vec<T>{} : load_part(p_.grad_h_n + r * P + col, lanes), lanes);
      });
    }
    if (projected_) {
      if (part_.barrier) team_.sync();
      product(
          Rows<L>{dh_of(i, all.begin), P}, all.size(), P, packed_hr_, H, Panels{part_.panels, i % 2 != 0},
          [](int64_t, int64_t) {},
          [&](int64_t m, int64_t col, Vec<T> value, int lanes) { through_cell(i, all.begin + m, col, value, lanes); });
    }
    into_h0(i + 1, intersect(part_.rows, {order_.rows(i), later}));  // rows that joined there
    if (part_.barrier) team_.sync();
  }

  // What follows from dz of a block: dx, and its part of the gradients of weights and biases.
  void products() {
    if (p_.dx != nullptr) {
      const Range rows = team_.share(block_.rows, kRows);
      S* dx = p_.dx + (block_.first + rows.begin) * s_.input;
      long_product(block_.dz + rows.begin * dz_width_, dz_width_, rows.size(), gates_, packed_ih_, s_.input,
                   static_cast<L*>(nullptr), [&](int64_t row, int64_t col, Vec<T> value, int lanes) {
                     store_part(dx + row * s_.input + col, value, lanes);
                   });
    }
    WeightGradient<S> of_input = {dw_ih_, s_.input, {}, false, p_.x, s_.input};
    WeightGradient<S> of_state = {dw_hh_, P, {}, true, nullptr, 0};
    for (int b = 0; b < C::kBlocks; ++b) {
      of_input.gates[b] = b < C::kGates ? input_gate<C>(b) : -1;
      of_state.gates[b] = state_gate<C>(b);
    }
    const Range rows = {block_.first, block_.first + block_.rows};
    const bool more = block_.steps.end < s_.steps;
    const auto states_before = [&](int64_t first) { return PreviousState<S>(p_, first); };
    weight_gradients(states_before, rows, block_.dz, H, C::kBlocks, {of_input, of_state}, more, space_, team_);
    if (projected_) {
      const WeightGradient<S> of_cell = {dw_hr_, H, {0}, false, p_.saved + (C::kBlocks + 1) * H, saved_width_};
      weight_gradients(states_before, rows, dh_, P, 1, {of_cell}, more, space_, team_);
    }
    const Range columns = team_.share(H, kLanes<T>);
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
  const Part part_;
  const bool projected_;
  const int64_t H = s_.hidden;
  const int64_t P = s_.output;
  const int64_t gates_ = C::kGates * H;
  const int64_t dz_width_ = C::kBlocks * H;
  const int64_t saved_width_ = saved_blocks(s_.mode, projected_) * H;
  R* packed_hh_;
  R* packed_hr_;
  R* packed_ih_;
  T* carry_;
  L* dh_;  // [rows of a block, P] gradients of the states, where they are projected
  T* dw_ih_;
  T* dw_hh_;
  T* dw_hr_;
  T* db_ih_;
  T* db_hh_;
  L* space_;
  Block block_;
  Block later_block_;  // the one that was at work before
};

template <typename S>
static void recurrence_forward(const RecurrenceForwardParams<S>& p, const ThreadTeam& team) {
  with_cell(p.sizes.mode, [&](auto cell) {
    if (goes_direct(p.sizes)) {
      forward_direct<S, decltype(cell)>(p, team);
    } else {
      forward_packed<S, decltype(cell)>(p, team);
    }
  });
}

template <typename S>
static void recurrence_backward(const RecurrenceBackwardParams<S>& p, const ThreadTeam& team) {
  with_cell(p.sizes.mode, [&](auto cell) { BackwardPass<S, decltype(cell)>(p, team).run(); });
}

// A constant, as all tables: to choose between the levels must not run code of any of them.
template <typename S>
static constexpr RecurrenceKernels<S> kRecurrenceKernels = {
    .packed_size = packed_weights_size<S>,
    .forward_workspace = recurrence_forward_workspace<S>,
    .backward_workspace = recurrence_backward_workspace<S>,
    .threads = recurrence_threads,
    .one_thread_per_recurrence = one_thread_per_recurrence<S>,
    .pack = pack_weights<S>,
    .forward = recurrence_forward<S>,
    .backward = recurrence_backward<S>,
};

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
