// Affine maps of rows, y = x W^T + b, and their gradients: the products beside the recurrence, as quick as those in it.
namespace llm_ext {
namespace LLM_EXT_LEVEL {

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

template <typename S>
static void linear_forward(const LinearForwardParams<S>& p, const Team& team) {
  const int64_t N = p.sizes.rows, I = p.sizes.input, O = p.sizes.output;
  const auto finish = [&](int64_t row, int64_t col, Vec<S> value, int lanes) {
    if (p.b != nullptr) value += load_part(p.b + col, lanes);
    store_part(p.y + row * O + col, value, lanes);
  };
  if (packs_linear<S>(p.sizes)) {
    pack_transposed([&](int64_t col) { return p.w + col * I; }, O, I, team.share(panels_of<S>(O)), p.workspace);
    team.sync();
    const Range rows = team.share(N, kRows);
    return long_product(
        p.x + rows.begin * I, I, rows.size(), I, p.workspace, O, static_cast<S*>(nullptr),
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
        row_dots<S>(DotFactors<S, S>{p.x + rows.begin * I, I, p.w + col * I, I, I}, DotFactors<S, S>{}, rows.size(),
                    lanes, values);
        for (int64_t r = rows.begin; r < rows.end; ++r) finish(r, col, values[r - rows.begin], lanes);
      }
    });
  }
}

// Where the backward pass puts what, besides its results. Sizes in elements of S.
template <typename S>
struct LinearBackwardSpace {
  LinearBackwardSpace(const LinearSizes& s, int threads)
      : packed(divide_up(packed_size<S>(s.input, s.output), kLanes<S>) * kLanes<S>),
        total(packed + threads * kGradientBlock<S>) {}

  int64_t packed;  // W, for dx
  int64_t total;   // and for each thread a block of the weight gradient
};

template <typename S>
static int64_t linear_backward_workspace(const LinearSizes& s, int threads) {
  return LinearBackwardSpace<S>(s, threads).total;
}

template <typename S>
static void linear_backward(const LinearBackwardParams<S>& p, const Team& team) {
  const int64_t N = p.sizes.rows, I = p.sizes.input, O = p.sizes.output;
  const LinearBackwardSpace<S> space(p.sizes, team.size);
  if (p.dx != nullptr) {
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
    .backward_workspace = linear_backward_workspace<S>,
    .forward = linear_forward<S>,
    .backward = linear_backward<S>,
};

}  // namespace LLM_EXT_LEVEL
}  // namespace llm_ext
