// Matrix products around the recurrence: packed weights and one register-blocked micro-kernel.
//
// A weight matrix with `cols` output columns and depth k is packed in panels of kPanel columns: panel[k][kPanel], so
// that the micro-kernel streams it. The last panel is only as many vectors wide as it needs to be. Panel p starts at
// p * kPanel * k.
//
// Weights of 16 bits stay as they are, and are widened as they are read. Where an instruction multiplies pairs of
// bfloat16, two numbers of k lie beside each other for each column, panel[k / 2][kPanel][2], an odd k filled up with a
// zero, and so do those of the left factor.
namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Accumulators are kRows x kPanelVectors registers; with the panel's vectors and one broadcast they fill the
// register file: 32 registers of AVX-512, 16 of the others.
constexpr int kPanelVectors = LLM_EXT_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kRows = 6;
// Seven rows go in one tile as well, with two vectors of a panel at a time: 4 x 4 and 3 x 4 would read the panel twice
// for too few multiply-adds. Zen 5, 7 rows: LSTM of H = 512 39 us a step instead of 46, of H = 1000 149 instead of 167;
// from 8 rows on it is no quicker. Where there are but 16 registers neither.
constexpr int kMostRows = LLM_EXT_VECTOR_BYTES == 64 ? 7 : kRows;
constexpr int kVectorsOfMostRows = 2;

template <typename T>
constexpr int64_t kPanel = kPanelVectors * kLanes<T>;

// Numbers of k that lie together in a panel of R.
template <typename R>
constexpr int kPair = kSame<R, BFloat16> && kHasDot ? 2 : 1;

// How the left factors of products with weights of S are stored.
template <typename S>
using Factor = Choose<kPair<S> == 2, S, Compute<S>>;

// Rows of the left factor that are saved in the second-level cache (512 KB or more), beside the panel in use.
// 64 and 128 KB are equal on Zen 3, 32 and 256 up to 5 % slower.
constexpr int64_t kBlockBytes = 128 << 10;

// How far ahead to fetch, in bytes of a panel and in rows to pack: what the machine does not foresee by itself at the
// start of a page or a row. Together 3 % of a backward pass on Zen 3 (B32 T128 I512 H512). Machines with AVX-512
// foresee more, and are saved from it: on Zen 5, fetching panels makes B1 H512 3.8 us a step instead of 2.5, LSTM B32
// H1024 690 instead of 605.
constexpr bool kFetchesPanels = LLM_EXT_VECTOR_BYTES < 64;
constexpr int kPanelAhead = 512;
constexpr int64_t kRowsAhead = 8;
// Packed weights of more bytes than this may not stay in any cache from step to step: then the next panel is fetched
// while the last rows are at the one before. Zen 3, B32: LSTM of H = 1024 (16 MB) 3.2 ms a step instead of 3.4, of
// H = 1500 7.6 instead of 8.9; Elman of H = 2048 3.1 instead of 3.5. Up to 4 MB there is nothing to gain.
constexpr int64_t kFarBytes = 6 << 20;

// Multiply-adds of products that repay one more thread: a team costs some 3 us. T16 H64 takes 8 us on one thread or
// two.
constexpr double kWorkPerThread = 1.0e5;

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many of `threads` so much work repays, `work_per_thread` being what repays one more of them.
static inline int threads_worth(double work, double work_per_thread, int threads) {
  const double useful = work / work_per_thread;
  return useful >= threads ? threads : (useful < 1 ? 1 : static_cast<int>(useful));
}

static inline Range intersect(Range a, Range b) {
  const int64_t begin = a.begin > b.begin ? a.begin : b.begin;
  const int64_t end = a.end < b.end ? a.end : b.end;
  return {begin, end > begin ? end : begin};
}

// n rows in tiles of at most `most`, `most_alone` in a single one, as even as can be; divides once.
struct Tiles {
  explicit Tiles(int64_t n, int most = kRows, int most_alone = kMostRows)
      : count(n == most_alone ? 1 : divide_up(n, most)), size(n / (count > 0 ? count : 1)), larger(n - size * count) {}

  Range operator[](int64_t i) const {
    const int64_t begin = i * size + (i < larger ? i : larger);
    return {begin, begin + size + (i < larger ? 1 : 0)};
  }

  int64_t count;
  int64_t size;
  int64_t larger;  // so many tiles, the first ones, have a row more
};

template <typename T>
static inline int64_t panels_of(int64_t cols) {
  return divide_up(cols, kPanel<T>);
}

// Vectors in panel p of a matrix with `cols` columns.
template <typename T>
static inline int panel_vectors(int64_t cols, int64_t p) {
  const int64_t left = cols - p * kPanel<T>;
  return left >= kPanel<T> ? kPanelVectors : static_cast<int>(divide_up(left, kLanes<T>));
}

// k filled up to whole pairs.
template <typename R>
static inline int64_t padded(int64_t k) {
  return divide_up(k, kPair<R>) * kPair<R>;
}

template <typename R>
static inline int64_t packed_size(int64_t cols, int64_t k) {
  constexpr int64_t kWide = kLanes<Compute<R>>;
  return divide_up(cols, kWide) * kWide * padded<R>(k);
}

// Packs panels [begin, end) of w^T, w being [cols, k]: panel[i][j] = w(p * kPanel + j)[i], or pairs of such numbers.
template <typename R, typename Row>
static inline void pack_transposed(Row w, int64_t cols, int64_t k, Range panels, R* packed) {
  using T = Compute<R>;
  using Unit = Choose<kPair<R> == 2, T, R>;  // a pair has the size of T, and passes for one
  const int64_t units = divide_up(k, kPair<R>);
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const int vectors = panel_vectors<T>(cols, p);
    Unit* panel = reinterpret_cast<Unit*>(packed + p * kPanel<T> * padded<R>(k));
    // Down the columns in short runs: the lines read stay in the first-level cache while all columns pass.
    constexpr int64_t kRun = 4 * kLanes<T>;
    for (int64_t begin = 0; begin < units; begin += kRun) {
      const int64_t end = begin + kRun < units ? begin + kRun : units;
      for (int v = 0; v < vectors; ++v) {
        const int64_t first = p * kPanel<T> + v * kLanes<T>;
        for (int64_t i = begin; i < end; i += kLanes<T>) {
          const int count = end - i < kLanes<T> ? static_cast<int>(end - i) : kLanes<T>;
          const auto column = [&](int64_t col) {
            if constexpr (kPair<R> == 2) {
              const int64_t left = k - 2 * i;
              return load_pairs(w(col) + 2 * i, left < 2 * count ? static_cast<int>(left) : 2 * count);
            } else {
              return load_part(w(col) + i, count);
            }
          };
          Vec<T> square[kLanes<T>];
#pragma GCC unroll 16
          for (int j = 0; j < kLanes<T>; ++j) square[j] = first + j < cols ? column(first + j) : Vec<T>{};
          transpose<T>(square);
          Unit* target = panel + (i * vectors + v) * kLanes<T>;
          for (int j = 0; j < count; ++j) store_exact(target + j * vectors * kLanes<T>, square[j]);
        }
      }
    }
  }
}

// Packs panels [begin, end) of k rows of `cols` columns: panel[i][j] = row(i)[p * kPanel + j], or pairs of such
// numbers. row(i) may be null: zeros. Rows are asked for in rising order.
template <typename R, typename Row>
static inline void pack_rows(Row row, int64_t cols, int64_t k, Range panels, R* packed) {
  using T = Compute<R>;
  using Unit = Choose<kPair<R> == 2, T, R>;
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const int vectors = panel_vectors<T>(cols, p);
    const int64_t first = p * kPanel<T>;
    const int64_t width = cols - first < vectors * kLanes<T> ? cols - first : vectors * kLanes<T>;
    Unit* target = reinterpret_cast<Unit*>(packed + first * padded<R>(k));
    for (int64_t i = 0; i < k; i += kPair<R>, target += vectors * kLanes<T>) {
      const auto* source = row(i);
      const auto* partner = kPair<R> == 2 && i + 1 < k ? row(i + 1) : nullptr;
      for (int v = 0; v < vectors; ++v) {
        const int64_t left = width - v * kLanes<T>;
        const int lanes = left < kLanes<T> ? static_cast<int>(left) : kLanes<T>;
        const int64_t at = first + v * kLanes<T>;
        Vec<T> value = source == nullptr ? Vec<T>{} : load_part(source + at, lanes);
        if constexpr (kPair<R> == 2) {
          value = make_pairs(value, partner == nullptr ? Vec<T>{} : load_part(partner + at, lanes));
        }
        store_exact(target + v * kLanes<T>, value);
      }
    }
  }
}

// Packs columns [columns) of `depth` rows, `stride` apart, as the left factor of a product over those rows: in tiles of
// kRows columns, as even as can be, tile[i][m] = row(i)[first column of the tile + m], or pairs of such numbers.
template <typename L>
static inline void pack_columns(const L* rows, int64_t stride, int64_t depth, Range columns, L* packed) {
  const Tiles tiles(columns.size());
  // Along the rows: the other way each row would be a line of the same few sets of the first-level cache.
  for (int64_t i = 0; i < depth; i += kPair<L>) {
    const L* row = rows + i * stride + columns.begin;
    for (int64_t j = 0; j < columns.size(); j += 64 / sizeof(L)) __builtin_prefetch(row + kRowsAhead * stride + j);
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const Range part = tiles[tile];
      L* target = packed + part.begin * padded<L>(depth) + i * part.size();
      if constexpr (kPair<L> == 2) {
        const bool whole = i + 1 < depth;
        for (int64_t m = 0; m < part.size(); ++m) {
          target[2 * m] = row[part.begin + m];
          target[2 * m + 1] = whole ? row[stride + part.begin + m] : L{};
        }
      } else if (part.size() == kRows) {
        __builtin_memcpy(target, row + part.begin, kRows * sizeof(L));  // of a known size: two moves
      } else {
        for (int64_t m = 0; m < part.size(); ++m) target[m] = row[part.begin + m];
      }
    }
  }
}

// The left factor of a product: rows as they lie in memory, or what pack_columns has packed.
template <typename L>
struct Rows {
  using Number = L;
  static constexpr bool kPacked = false;
  const L* data;
  int64_t stride;

  const L* tile(int64_t first, int64_t) const { return data + first * stride; }
};
template <typename L>
struct PackedColumns {
  using Number = L;
  static constexpr bool kPacked = true;
  static constexpr int64_t stride = 0;  // a packed tile has its own
  const L* data;

  const L* tile(int64_t first, int64_t k) const { return data + first * padded<L>(k); }
};

// sums[m][column] = sum over i of a(m, i) * panel[i][column]: the micro-kernel. a(m, i) is a[m * stride + i] or,
// packed, a[i * M + m]; of pairs, a[i / 2 * M + m][i % 2]. With few rows the sum is split over several sets of
// accumulators: a multiply-add takes four cycles and two can start in each. `panel` is [k][NV vectors], or pairs,
// `sums` [M][NV vectors] and overlaps neither factor. k places (pairs: half as many) from `ahead` on, `ahead_step`
// apart, are fetched and not read, whatever lies there.
//
// It leaves its sums in memory, where the caller finishes them (bias, activation, derivative): so there is one
// micro-kernel a shape, not one for each way to finish, and the detour is a few vectors after hundreds of
// multiply-adds.
//
// Here for kCount of the vectors, from kFirst on.
template <typename L, typename R, int M, int NV, int kFirst, int kCount, bool kPacked>
static inline void multiply_vectors(const L* a, int64_t stride, int64_t k, const R* panel, Compute<R>* sums,
                                    const R* ahead, int64_t ahead_step) {
  using T = Compute<R>;
  constexpr int kSets = M * kCount >= 8 ? 1 : (M * kCount >= 4 ? 2 : 4);
  constexpr int kWidth = NV * kLanes<T>;
  Vec<T> acc[kSets][M][kCount] = {};
  const auto accumulate = [&](Vec<T>(&set)[M][kCount], int64_t i) {
    const R* const right = panel + (i * kWidth + kFirst * kLanes<T>)*kPair<R>;
    if (kFetchesPanels) __builtin_prefetch(ahead + i * ahead_step);
    if constexpr (kPair<R> == 1) {
      Vec<T> b[kCount];
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) b[v] = load(right + v * kLanes<T>);
#pragma GCC unroll 7
      for (int m = 0; m < M; ++m) {
        const Vec<T> left = broadcast(kPacked ? a[i * M + m] : a[m * stride + i]);
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) set[m][v] += left * b[v];
      }
    } else {
#pragma GCC unroll 7
      for (int m = 0; m < M; ++m) {
        const L* const left = kPacked ? a + 2 * (i * M + m) : a + m * stride + 2 * i;
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) set[m][v] = dot(set[m][v], left, 2, right + 2 * v * kLanes<T>);
      }
    }
  };
  const int64_t units = kPacked ? divide_up(k, kPair<R>) : k / kPair<R>;
  int64_t i = 0;
  for (; i + kSets <= units; i += kSets) {
#pragma GCC unroll 4
    for (int s = 0; s < kSets; ++s) accumulate(acc[s], i + s);
  }
  for (; i < units; ++i) accumulate(acc[0], i);
  if (kPair<R> == 2 && !kPacked && k % 2 != 0) {  // the last of an odd number, not to be read as a pair
    const R* const right = panel + (i * kWidth + kFirst * kLanes<T>)*kPair<R>;
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < kCount; ++v) {
        if constexpr (kPair<R> == 2) {
          acc[0][m][v] = dot(acc[0][m][v], a + m * stride + k - 1, 1, right + 2 * v * kLanes<T>);
        }
      }
    }
  }
#pragma GCC unroll 7
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) {
#pragma GCC unroll 4
      for (int s = 1; s < kSets; ++s) acc[0][m][v] += acc[s][m][v];
      store(sums + m * kWidth + (kFirst + v) * kLanes<T>, acc[0][m][v]);
    }
  }
}

// For all of them: at once, or so many at a time that there are registers for M rows.
template <typename L, typename R, int M, int NV, bool kPacked>
__attribute__((noinline)) static void multiply(const L* a, int64_t stride, int64_t k, const R* panel, Compute<R>* sums,
                                               const R* ahead, int64_t ahead_step) {
  constexpr int kCount = M <= kRows || NV <= kVectorsOfMostRows ? NV : kVectorsOfMostRows;
  multiply_vectors<L, R, M, NV, 0, kCount, kPacked>(a, stride, k, panel, sums, ahead, ahead_step);
  if constexpr (kCount < NV) {
    multiply_vectors<L, R, M, NV, kCount, NV - kCount, kPacked>(a, stride, k, panel, sums, ahead, ahead_step);
  }
}

template <typename L, typename R>
using Multiply = void (*)(const L*, int64_t, int64_t, const R*, Compute<R>*, const R*, int64_t);

// The micro-kernel for m rows and nv vectors.
template <typename L, typename R, bool kPacked>
static inline Multiply<L, R> multiply_for(int m, int nv) {
#define LLM_EXT_ROWS(NV)                                                                          \
  multiply<L, R, 1, NV, kPacked>, multiply<L, R, 2, NV, kPacked>, multiply<L, R, 3, NV, kPacked>, \
      multiply<L, R, 4, NV, kPacked>, multiply<L, R, 5, NV, kPacked>, multiply<L, R, 6, NV, kPacked>
  static constexpr Multiply<L, R> kTable[kPanelVectors][kMostRows] = {
#if LLM_EXT_VECTOR_BYTES == 64
      {LLM_EXT_ROWS(1), multiply<L, R, 7, 1, kPacked>},
      {LLM_EXT_ROWS(2), multiply<L, R, 7, 2, kPacked>},
      {LLM_EXT_ROWS(3), multiply<L, R, 7, 3, kPacked>},
      {LLM_EXT_ROWS(4), multiply<L, R, 7, 4, kPacked>},
#else
      {LLM_EXT_ROWS(1)},
      {LLM_EXT_ROWS(2)},
#endif
  };
#undef LLM_EXT_ROWS
  return kTable[nv - 1][m - 1];
}

// Panels of a product, and whether to read them backwards. Whoever reads the same panels again should turn around each
// time: what a cache still holds of them then comes first. It is only done for a single tile, whose time goes into
// reading: on Zen 5 LSTM B1 H512 19.2 us a step instead of 20.6; with more tiles it is up to 2 % slower.
struct Panels {
  Range range;
  bool backwards = false;
};

// a [rows, k] times panels of kGates packed matrices with `cols` columns each, `gate_size` apart;
// finish(row, column, values, lanes) takes the results, a vector of each gate at a time, and fetch(row, column) is told
// beforehand where a row of a tile will need memory. Rows go in tiles; a panel stays in the cache for all of them.
template <int kGates, typename R, typename Left, typename Fetch, typename Finish>
static inline void gates_product(Left a, int64_t rows, int64_t k, const R* packed, int64_t gate_size, int64_t cols,
                                 Panels panels, Fetch fetch, Finish finish) {
  using T = Compute<R>;
  using L = typename Left::Number;
  constexpr int kSums = kMostRows * kPanel<T>;
  alignas(64) T sums[kGates * kSums];
  const Tiles tiles(rows);
  const int64_t depth = padded<R>(k);
  const bool far =
      kFetchesPanels && kGates * cols * depth * static_cast<int64_t>(sizeof(R)) > kFarBytes && !Left::kPacked;
  const bool backwards = panels.backwards && tiles.count == 1;
  for (int64_t i = panels.range.begin; i < panels.range.end; ++i) {
    const int64_t p = backwards ? panels.range.end - 1 - (i - panels.range.begin) : i;
    const int64_t first = p * kPanel<T>;
    const int64_t next = (p + 1 < panels.range.end ? p + 1 : panels.range.begin) * kPanel<T>;
    const int vectors = panel_vectors<T>(cols, p);
    const int64_t width = cols - first < kPanel<T> ? cols - first : kPanel<T>;
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const Range part = tiles[tile];
      const int count = static_cast<int>(part.size());
      for (int64_t m = part.begin; m < part.end; ++m) fetch(m, first);
      const Multiply<L, R> multiply = multiply_for<L, R, Left::kPacked>(count, vectors);
      const L* left = a.tile(part.begin, k);
      for (int g = 0; g < kGates; ++g) {
        const R* panel = packed + g * gate_size + first * depth;
        const R* ahead = panel + kPanelAhead / static_cast<int>(sizeof(R));
        int64_t ahead_step = vectors * kLanes<T> * kPair<R>;
        if (far && tile > 0) {  // each tile but the first its share of the next panel
          ahead_step /= tiles.count - 1;
          ahead = packed + g * gate_size + next * depth + (tile - 1) * (depth / kPair<R>)*ahead_step;
        }
        multiply(left, a.stride, k, panel, sums + g * kSums, ahead, ahead_step);
      }
      for (int m = 0; m < count; ++m) {
        const T* row = sums + m * vectors * kLanes<T>;
        for_each_vector<T>(width, [&](int64_t j, int lanes) {
          Vec<T> values[kGates];
          for (int g = 0; g < kGates; ++g) values[g] = load(row + g * kSums + j);
          finish(part.begin + m, first + j, values, lanes);
        });
      }
    }
  }
}

// The same with one matrix; finish(row, column, value, lanes).
template <typename R, typename Left, typename Fetch, typename Finish>
static inline void product(Left a, int64_t rows, int64_t k, const R* packed, int64_t cols, Panels panels, Fetch fetch,
                           Finish finish) {
  gates_product<1>(
      a, rows, k, packed, 0, cols, panels, fetch,
      [&](int64_t row, int64_t col, Vec<Compute<R>>(&value)[1], int lanes) { finish(row, col, value[0], lanes); });
}

// Rows of a left factor that a long product takes at a time.
template <typename L>
static inline int64_t rows_of_block(int64_t k) {
  const int64_t fitting = kBlockBytes / static_cast<int64_t>(sizeof(L)) / (k + 1) / kRows * kRows;
  return fitting > kRows ? fitting : kRows;
}

// The same for many rows, `stride` apart and stored as S, by blocks that stay in the second-level cache while all
// panels pass. `space` has room for a block of rows of L; it is used only if S is another type.
template <typename L, typename S, typename R, typename Finish>
static inline void long_product(const S* a, int64_t stride, int64_t rows, int64_t k, const R* packed, int64_t cols,
                                L* space, Finish finish) {
  const auto nothing = [](int64_t, int64_t) {};
  const int64_t block = rows_of_block<L>(k);
  for (int64_t begin = 0; begin < rows; begin += block) {
    const int64_t count = rows - begin < block ? rows - begin : block;
    Rows<L> left;
    if constexpr (kSame<S, L>) {
      left = {a + begin * stride, stride};
    } else {
      for (int64_t i = 0; i < count; ++i) convert(a + (begin + i) * stride, space + i * k, k);
      left = {space, k};
    }
    product(
        left, count, k, packed, cols, Panels{{0, panels_of<Compute<R>>(cols)}}, nothing,
        [&](int64_t row, int64_t col, Vec<Compute<R>> value, int lanes) { finish(begin + row, col, value, lanes); });
  }
}

// Products with weights in their own layout, [cols, k]: dot products of their rows with those of the left factor, in
// tiles of both, vectors lying along k. No packing; instead each dot product ends with a sum over lanes. A tile of
// accumulators, vectors of its right rows and one of a left row fit into the register file.
constexpr int kDotRows = LLM_EXT_VECTOR_BYTES == 64 ? 6 : 2;
template <typename T, int kRowsOfTile>
constexpr int kDotColumns = [] {
  constexpr int kChains = 8;  // multiply-adds that run at once
  constexpr int kWanted = kRowsOfTile == 1 ? kChains : 4;
  return kLanes<T> < kWanted ? kLanes<T> : kWanted;
}();

// Rows of two factors over k numbers.
template <typename L, typename R>
struct DotFactors {
  const L* a;
  int64_t a_stride;
  const R* w;
  int64_t w_stride;
  int64_t k;

  DotFactors rows_from(int64_t row) const { return {a + row * a_stride, a_stride, w, w_stride, k}; }
  DotFactors columns_from(int64_t col) const { return {a, a_stride, w + col * w_stride, w_stride, k}; }
};

// acc[m * N + n] += a_m . w_n, in lanes.
template <typename T, int M, int N, typename L, typename R>
static inline void add_dots(const DotFactors<L, R>& f, Vec<T> (&acc)[M * N]) {
  const auto add = [&](auto load_at) {
    Vec<T> right[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) right[n] = load_at(f.w + n * f.w_stride);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const Vec<T> left = load_at(f.a + m * f.a_stride);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[m * N + n] += left * right[n];
    }
  };
  int64_t i = 0;
  for (; i + kLanes<T> <= f.k; i += kLanes<T>) add([&](const auto* row) { return load(row + i); });
  if (i < f.k) add([&](const auto* row) { return load_part(row + i, static_cast<int>(f.k - i)); });
}

// dots[m][j] = a_m . w_j of `first`, and on top of it of `second`, for M rows and a vector of columns, the first
// `lanes` of it.
template <typename T, int M, typename L1, typename L2, typename R>
static inline void row_dots(const DotFactors<L1, R>& first, const DotFactors<L2, R>& second, int lanes, Vec<T>* dots) {
  constexpr int N = kDotColumns<T, M>;
  constexpr int kTiles = kLanes<T> / N;
  if (lanes < kLanes<T>) {
    for (int j = 0; j < lanes; ++j) {
      Vec<T> acc[M] = {};
      add_dots<T, M, 1>(first.columns_from(j), acc);
      add_dots<T, M, 1>(second.columns_from(j), acc);
      for (int m = 0; m < M; ++m) dots[m][j] = sum_lanes<T>(acc[m]);
    }
    return;
  }
  Vec<T> tiles[M][kTiles];
  for (int t = 0; t < kTiles; ++t) {
    Vec<T> acc[M * N];
#pragma GCC unroll 24
    for (int i = 0; i < M * N; ++i) acc[i] = Vec<T>{};  // not at once: that would be done in memory
    add_dots<T, M, N>(first.columns_from(t * N), acc);
    add_dots<T, M, N>(second.columns_from(t * N), acc);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) tiles[m][t] = sum_halves<T, N>(acc + m * N);
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    dots[m] = sum_halves<T, kTiles>(tiles[m]);
    for (int n = kTiles; n > 1; n /= 2) dots[m] = separate<T>(dots[m]);  // in which the tiles take turns
  }
}

// The same for any number of rows up to kDotRows.
template <typename T, typename L1, typename L2, typename R>
static inline void row_dots(const DotFactors<L1, R>& first, const DotFactors<L2, R>& second, int64_t rows, int lanes,
                            Vec<T>* dots) {
  using Dots = void (*)(const DotFactors<L1, R>&, const DotFactors<L2, R>&, int, Vec<T>*);
  static constexpr Dots kTable[kDotRows] = {
      row_dots<T, 1, L1, L2, R>, row_dots<T, 2, L1, L2, R>,
#if LLM_EXT_VECTOR_BYTES == 64
      row_dots<T, 3, L1, L2, R>, row_dots<T, 4, L1, L2, R>, row_dots<T, 5, L1, L2, R>, row_dots<T, 6, L1, L2, R>,
#endif
  };
  // A single row of small sizes is worth a copy of its own in each caller: GRU of H = 64 6.5 us a step instead of 6.8.
  if (rows == 1) return row_dots<T, 1>(first, second, lanes, dots);
  kTable[rows - 1](first, second, lanes, dots);
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
