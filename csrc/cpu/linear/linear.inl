// Affine maps of rows, y = x W^T + b, and their gradients: the products beside the recurrence, as quick as those in it.
namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Whether W is packed first: where rows are many beside its columns. Else it is read in its own layout. Zen 5, 512
// columns, k = 512: 256 rows 454 GFLOP/s by dot products and 471 packed, 384 rows 438 and 491.
template <typename S>
static bool packs_linear(const LinearSizes& s) {
  return s.rows > 4 * kDotRows && s.rows > s.output / 2;
}

static int linear_threads(const LinearSizes& s, int threads) {
  return threads_worth(static_cast<double>(s.rows) * s.input * s.output, kWorkPerThread, threads);
}

template <typename S>
static int64_t linear_forward_workspace(const LinearSizes& s) {
  return packs_linear<S>(s) ? packed_size<S>(s.output, s.input) : 0;
}

// x W^T, a vector of a row at a time: finish(row, column, value, lanes). `space` has room for the packed W.
template <typename S, typename Finish>
static inline void linear_product(const LinearSizes& s, const S* x, const S* w, S* space, const ThreadTeam& team,
                                  Finish finish) {
  const int64_t N = s.rows, I = s.input, O = s.output;
  if (packs_linear<S>(s)) {
    pack_transposed([&](int64_t col) { return w + col * I; }, O, I, team.share(panels_of<S>(O)), space);
    team.sync();
    const Range rows = team.share(N, kRows);
    return long_product(
        x + rows.begin * I, I, rows.size(), I, space, O, static_cast<S*>(nullptr),
        [&](int64_t row, int64_t col, Vec<S> value, int lanes) { finish(rows.begin + row, col, value, lanes); });
  }
  const Range columns = team.share(O, kLanes<S>);
  const int64_t block = rows_of_block<S>(I);
  for (int64_t begin = 0; begin < N; begin += block) {
    const Tiles tiles(N - begin < block ? N - begin : block, kDotRows, kDotRows);
    for_each_vector<S>(columns.size(), [&](int64_t j, int lanes) {
      const int64_t col = columns.begin + j;
      for (int64_t i = 0; i < tiles.count; ++i) {
        const Range rows = {begin + tiles[i].begin, begin + tiles[i].end};
        Vec<S> values[kDotRows];
        row_dots<S>(DotFactors<S, S>{x + rows.begin * I, I, w + col * I, I, I}, DotFactors<S, S>{}, rows.size(), lanes,
                    values);
        for (int64_t r = rows.begin; r < rows.end; ++r) finish(r, col, values[r - rows.begin], lanes);
      }
    });
  }
}

template <typename S>
static void linear_forward(const LinearForwardParams<S>& p, const ThreadTeam& team) {
  const int64_t O = p.sizes.output;
  linear_product(p.sizes, p.x, p.w, p.workspace, team, [&](int64_t row, int64_t col, Vec<S> value, int lanes) {
    if (p.b != nullptr) value += load_part(p.b + col, lanes);
    if (p.addend != nullptr) value += load_part(p.addend + row * O + col, lanes);
    if (p.tanh) value = vec_tanh<S>(value);
    store_part(p.y + row * O + col, value, lanes);
  });
}

// Of the columns that fall to one lane of a thread: the largest value, and where that vector of columns begins; -1 if
// there are none.
template <typename S>
struct Largest {
  Vec<S> value;
  IntVec<S> begin;
};

// Where they lie in the workspace, behind the packed W: those of each thread for each row. Sizes in elements of S.
template <typename S>
struct LinearArgmaxSpace {
  static constexpr int64_t kSize = sizeof(Largest<S>) / sizeof(S);

  LinearArgmaxSpace(const LinearSizes& s, int threads)
      : packed(divide_up(linear_forward_workspace<S>(s), kSize) * kSize), total(packed + threads * s.rows * kSize) {}

  int64_t packed;
  int64_t total;
};

template <typename S>
static int64_t linear_argmax_workspace(const LinearSizes& s, int threads) {
  return LinearArgmaxSpace<S>(s, threads).total;
}

template <typename S>
static void linear_argmax(const LinearArgmaxParams<S>& p, const ThreadTeam& team) {
  const int64_t N = p.sizes.rows;
  // A row's columns are one thread's or, where W is not packed, all threads'.
  auto* const all = reinterpret_cast<Largest<S>*>(p.workspace + LinearArgmaxSpace<S>(p.sizes, team.size).packed);
  Largest<S>* const own = all + team.rank * N;
  for (int64_t r = 0; r < N; ++r) own[r] = {broadcast(-infinity<S>()), IntVec<S>{} - 1};
  IntVec<S> lane{};
  for (int i = 0; i < kLanes<S>; ++i) lane[i] = i;
  linear_product(p.sizes, p.x, p.w, p.workspace, team, [&](int64_t row, int64_t col, Vec<S> value, int lanes) {
    if (p.b != nullptr) value += load_part(p.b + col, lanes);
    Largest<S>& best = own[row];
    // The first vector of all is taken even where it is -infinity.
    auto taken = value > best.value || value != value || best.begin < 0;
    if (lanes < kLanes<S>) taken = taken && lane < lanes;
    best.value = taken ? value : best.value;
    best.begin = taken ? IntVec<S>{} + static_cast<int>(col) : best.begin;
  });
  team.sync();
  const Range rows = team.share(N);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    S value = S(0);
    int64_t place = -1;
    for (int t = 0; t < team.size; ++t) {
      const Largest<S>& best = all[t * N + r];
      for (int i = 0; i < kLanes<S>; ++i) {
        if (best.begin[i] < 0) continue;
        const S other = best.value[i];
        const int64_t column = best.begin[i] + i;
        const bool larger = other > value || (other != other && value == value);
        if (place < 0 || larger || (other == value && column < place)) value = other, place = column;
      }
    }
    p.indices[r] = place;
  }
}

// Up to so many rows dx is multiplied by W as it lies, elsewhere packing it repays. Zen 5, I = O = 512: one row 13 us
// instead of 29, 32 rows 99 and 162, 48 rows 145 and 142; I = 256, O = 4096: 31 and 343, 396 and 478, 606 and 534.
constexpr int64_t kDirectGradientRows = 32;

// y = a w for M rows of a and NV vectors of columns, the last of so many lanes. w is [k, *] as it lies.
template <typename S, int M, int NV>
static inline void multiply_direct(const S* a, int64_t a_stride, int64_t k, const S* w, int64_t w_stride, S* y,
                                   int64_t y_stride, int lanes) {
  Vec<S> acc[M * NV];
#pragma GCC unroll 24
  for (int i = 0; i < M * NV; ++i) acc[i] = Vec<S>{};
  for (int64_t i = 0; i < k; ++i) {
    Vec<S> right[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      const S* from = w + i * w_stride + v * kLanes<S>;
      right[v] = v + 1 < NV || lanes == kLanes<S> ? load(from) : load_part(from, lanes);
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const Vec<S> left = broadcast(a[m * a_stride + i]);
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) acc[m * NV + v] += left * right[v];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < NV; ++v) {
      store_part(y + m * y_stride + v * kLanes<S>, acc[m * NV + v], v + 1 < NV ? kLanes<S> : lanes);
    }
  }
}

// dx = grad_y W for a few rows and these columns: a panel of columns for all tiles of rows, while it is in the cache.
template <typename S>
static inline void input_gradient_direct(const LinearBackwardParams<S>& p, Range columns) {
  const int64_t N = p.sizes.rows, I = p.sizes.input, O = p.sizes.output;
  const Tiles tiles(N, kRows, kRows);
  const auto block = [&](auto vectors, int64_t col, int lanes) {
    constexpr int NV = decltype(vectors)::value;
    using Block = void (*)(const S*, int64_t, int64_t, const S*, int64_t, S*, int64_t, int);
    static constexpr Block kTable[kRows] = {multiply_direct<S, 1, NV>, multiply_direct<S, 2, NV>,
                                            multiply_direct<S, 3, NV>, multiply_direct<S, 4, NV>,
                                            multiply_direct<S, 5, NV>, multiply_direct<S, 6, NV>};
    for (int64_t i = 0; i < tiles.count; ++i) {
      const Range rows = tiles[i];
      kTable[rows.size() - 1](p.grad_y + rows.begin * O, O, O, p.w + col, I, p.dx + rows.begin * I + col, I, lanes);
    }
  };
  int64_t col = columns.begin;
  for (; col + kPanel<S> <= columns.end; col += kPanel<S>) block(Constant<kPanelVectors>{}, col, kLanes<S>);
  for (; col < columns.end; col += kLanes<S>) {
    const int64_t left = columns.end - col;
    block(Constant<1>{}, col, left < kLanes<S> ? static_cast<int>(left) : kLanes<S>);
  }
}

// Where the backward pass puts what, besides its results. Sizes in elements of S.
template <typename S>
struct LinearBackwardSpace {
  LinearBackwardSpace(const LinearSizes& s, int threads)
      : packed(s.rows <= kDirectGradientRows ? 0 : divide_up(packed_size<S>(s.input, s.output), kLanes<S>) * kLanes<S>),
        total(packed + threads * kGradientBlock<S>) {}

  int64_t packed;  // W, for dx
  int64_t total;   // and for each thread a block of the weight gradient
};

template <typename S>
static int64_t linear_backward_workspace(const LinearSizes& s, int threads) {
  return LinearBackwardSpace<S>(s, threads).total;
}

template <typename S>
static void linear_backward(const LinearBackwardParams<S>& p, const ThreadTeam& team) {
  const int64_t N = p.sizes.rows, I = p.sizes.input, O = p.sizes.output;
  const LinearBackwardSpace<S> space(p.sizes, team.size);
  if (p.dx != nullptr && N <= kDirectGradientRows) {
    input_gradient_direct(p, team.share(I, kLanes<S>));
  } else if (p.dx != nullptr) {
    pack_rows([&](int64_t i) { return p.w + i * I; }, I, O, team.share(panels_of<S>(I)), p.workspace);
    team.sync();
    const Range rows = team.share(N, kRows);
    S* const dx = p.dx + rows.begin * I;
    long_product(
        p.grad_y + rows.begin * O, O, rows.size(), O, p.workspace, I, static_cast<S*>(nullptr),
        [&](int64_t row, int64_t col, Vec<S> value, int lanes) { store_part(dx + row * I + col, value, lanes); });
  }
  const auto nothing_gathered = [](int64_t) { return [](int64_t) { return static_cast<const S*>(nullptr); }; };
  const WeightGradient<S> of_weight = {p.dw, I, {0}, false, p.x, I};
  weight_gradients<S>(nothing_gathered, {0, N}, p.grad_y, O, 1, {of_weight}, false,
                      p.workspace + space.packed + team.rank * kGradientBlock<S>, team);
  const Range columns = team.share(O, kLanes<S>);
  if (p.db != nullptr) {
    column_sums(p.grad_y + columns.begin, N, O, columns.size(), p.db + columns.begin, static_cast<S*>(nullptr), false);
  }
}

template <typename S>
static constexpr LinearKernels<S> kLinearKernels = {
    .threads = linear_threads,
    .forward_workspace = linear_forward_workspace<S>,
    .argmax_workspace = linear_argmax_workspace<S>,
    .backward_workspace = linear_backward_workspace<S>,
    .forward = linear_forward<S>,
    .argmax = linear_argmax<S>,
    .backward = linear_backward<S>,
};

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
