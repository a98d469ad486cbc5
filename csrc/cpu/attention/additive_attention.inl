// Additive attention: scores v . tanh(query + key), softmax over the keys, the weighted mean of the values. The limit
// is arithmetic, and of it the reciprocal. docs/attention.md derives the formulas.
//
// tanh(q + k) = 1 - 2 r with r = 1 / (1 + e^2q e^2k): exponentials are taken of Tq + Tk rows, not of Tq * Tk pairs.
// They lie as panels [A / lanes][row][lanes], so that what a block of registers reads lies together; behind the last
// row and the last column stand ones, whose v is zero. A tile of queries meets all keys of its batch row; what is
// stored of a pair is its score and its gradient, of one tile at a time.
//
// A team shares the batch where that comes out even; elsewhere all of it works on one batch row: scores by keys, what
// follows the softmax by columns, so that no sum is shared.
namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Queries of a tile: lanes of whole vectors at every level.
constexpr int kQueryTile = 16;
// Queries or keys at a time.
constexpr int kRowBlock = 4;
// Sums in registers: of so many queries by kRowBlock keys; of so many rows by one vector of columns or, where there are
// fewer rows, by several. There are 32 registers with AVX-512, 16 without.
constexpr int kQueryBlock = LLM_EXT_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kWideBlock = 8;
constexpr int kColumnSums = LLM_EXT_VECTOR_BYTES == 64 ? 16 : 8;
// Pairs times A that repay one more thread: some 5 us with AVX-512. An exponential counts for three of them.
constexpr double kAdditiveWorkPerThread = 1.0e5;

// Beyond this, exponentials are those of the bound: e^2q e^2k and 1 more than it stay finite.
template <typename T>
constexpr T kExponentBound = sizeof(T) == 4 ? T(21.9) : T(177);
// tanh of so much is 1 to the last bit.
template <typename T>
constexpr T kSaturation = sizeof(T) == 4 ? T(9) : T(19);

// Whether the largest magnitudes in a query's and a key's row admit that they nearly cancel where the bound has changed
// one of them. If the bound changed q, and |k| <= bound - saturation, tanh is 1 or -1 before and after.
template <typename T>
static inline bool may_cancel(T query_size, T key_size) {
  const T high = query_size > key_size ? query_size : key_size;
  const T low = query_size > key_size ? key_size : query_size;
  return high > kExponentBound<T> && low > kExponentBound<T> - kSaturation<T>;
}

// Deals out [0, n) in blocks of `most`, then of halves of it: body(first, Constant<size>).
template <int most, typename Body>
static inline void for_each_block(int64_t n, const Body& body, int64_t first = 0) {
  for (; first + most <= n; first += most) body(first, Constant<most>{});
  if constexpr (most > 1) for_each_block<most / 2>(n, body, first);
}

// Where things lie in the workspace of those who share a batch row: `shared` is theirs, `own` one thread's, each of
// size() elements. Without them it only counts.
template <typename T>
struct AdditiveWorkspace {
  template <typename S>
  AdditiveWorkspace(const AdditiveAttentionInput<S>& in, bool backward, T* shared = nullptr, T* own = nullptr)
      : vectors(divide_up(in.attn_dim, kLanes<T>)),
        rows(divide_up(in.keys, kRowBlock) * kRowBlock),
        width(divide_up(in.value_dim, kLanes<T>) * kLanes<T>) {
    const int64_t attn = vectors * kLanes<T>;
    saved = reinterpret_cast<int32_t*>(take(own, in.keys));
    v = take(own, attn);
    keys = take(shared, attn * rows);
    query = take(shared, attn * kQueryTile);
    key_size = take(shared, rows);
    query_size = take(shared, kQueryTile);
    scores = take(shared, rows * kQueryTile);
    if (!backward) return;
    dv = take(own, attn);
    dscores = take(shared, rows * kQueryTile);
    grad = take(shared, width * kQueryTile);
    dkeys = take(shared, attn * rows);
    dvalues = take(shared, width * rows);
  }

  int64_t size() const { return used_; }

  int64_t vectors;       // of A
  int64_t rows;          // of keys, in whole blocks
  int64_t width;         // Dv in whole vectors
  int32_t* saved;         // [Tk] own: the keys that any query of the row sees
  T* v;                  // [A] own
  T* keys;               // panel of e^2k of the saved keys
  T* query;              // panel of e^2q of the tile
  T* key_size;           // [rows] largest magnitude of each saved key
  T* query_size;         // [kQueryTile]
  T* scores;             // [rows, kQueryTile] then the weights
  T* dv = nullptr;       // [A] own: sums of ds r, of all its rows
  T* dscores = nullptr;  // [rows, kQueryTile] gradients of the weights, then of the scores
  T* grad = nullptr;     // [kQueryTile, width] gradients of the context
  T* dkeys = nullptr;    // panel: sums of ds r (1 - r)
  T* dvalues = nullptr;  // [rows, width]

 private:
  T* take(T* base, int64_t n) {
    T* p = base == nullptr ? nullptr : base + used_;
    used_ += aligned(n);
    return p;
  }

  int64_t used_ = 0;
};

// r of one pair from its own exponential, which is as exact as tanh of the sum.
template <typename S, typename T = Compute<S>>
static inline Vec<T> exact_reciprocal(const S* query, const S* key, int lanes) {
  const Vec<T> x = load_part(query, lanes) + load_part(key, lanes);
  return T(1) / (T(1) + vec_exp<T>(x + x));
}

// Exponentials of 0 < count <= kRowBlock rows of n numbers into neighbouring rows of a panel of `rows` rows, and the
// largest magnitude of each.
template <typename S, typename T>
static inline void write_exponentials(const S* const* from, int count, int64_t n, T* panel, int64_t rows, T* sizes) {
  Vec<T> largest[kRowBlock] = {};
  for_each_vector<T>(n, [&](int64_t a, int lanes) {
    for (int j = 0; j < count; ++j) {
      Vec<T> x = load_part(from[j] + a, lanes);
      const Vec<T> magnitude = x < T(0) ? -x : x;
      largest[j] = magnitude > largest[j] ? magnitude : largest[j];
      x = x > kExponentBound<T> ? broadcast(kExponentBound<T>) : x;
      x = x < -kExponentBound<T> ? broadcast(-kExponentBound<T>) : x;
      Vec<T> scale, expm1;
      exp_parts<T>(x + x, &scale, &expm1);
      store(panel + a * rows + j * kLanes<T>, scale * expm1 + scale);
    }
  });
  for (int j = 0; j < count; ++j) {
    sizes[j] = T(0);
    for (int i = 0; i < kLanes<T>; ++i) sizes[j] = largest[j][i] > sizes[j] ? largest[j][i] : sizes[j];
  }
}

// Sums of v r over A, of `queries` rows and kRowBlock keys.
template <int queries, typename T>
static inline void pair_sums(const T* query, const T* keys, int64_t rows, const T* v, int64_t vectors,
                             Vec<T> (&sums)[kRowBlock][queries]) {
  for (int64_t a = 0; a < vectors; ++a) {
    const Vec<T> factor = load(v + a * kLanes<T>);
    Vec<T> q[queries];
#pragma GCC unroll 4
    for (int i = 0; i < queries; ++i) q[i] = load(query + (a * kQueryTile + i) * kLanes<T>);
#pragma GCC unroll 4
    for (int j = 0; j < kRowBlock; ++j) {
      const Vec<T> k = load(keys + (a * rows + j) * kLanes<T>);
#pragma GCC unroll 4
      for (int i = 0; i < queries; ++i) sums[j][i] += factor * reciprocal<T>(q[i] * k + T(1));
    }
  }
}

// Products of gradients of the context with the values of kRowBlock keys.
template <int queries, typename S, typename T>
static inline void pair_products(const T* grad, int64_t width, const S* const* values, int64_t n,
                                 Vec<T> (&sums)[kRowBlock][queries]) {
  for_each_vector<T>(n, [&](int64_t d, int lanes) {
    Vec<T> g[queries];
#pragma GCC unroll 4
    for (int i = 0; i < queries; ++i) g[i] = load(grad + i * width + d);
#pragma GCC unroll 4
    for (int j = 0; j < kRowBlock; ++j) {
      const Vec<T> value = load_part(values[j] + d, lanes);
#pragma GCC unroll 4
      for (int i = 0; i < queries; ++i) sums[j][i] += g[i] * value;
    }
  });
}

// What forward and backward have in common: one batch row, a tile of queries at a time.
template <typename S>
class AdditiveRow {
 public:
  using T = Compute<S>;

  AdditiveRow(const AdditiveAttentionInput<S>& input, const AdditiveWorkspace<T>& workspace, const ThreadTeam& those,
              bool backward)
      : in(input), w(workspace), team(those), direct(input.queries == 1 && !backward) {
    for (int64_t a = 0; a < w.vectors; ++a) store(w.v + a * kLanes<T>, Vec<T>{});
    convert(in.v, w.v, in.attn_dim);
    Vec<T> sum{};
    for (int64_t a = 0; a < w.vectors; ++a) sum += load(w.v + a * kLanes<T>);
    v_sum = sum_lanes<T>(sum);
  }

  // Finds the keys of batch row b, and their exponentials.
  void begin(int64_t row) {
    b = row;
    find_keys();
    if (row > 0) team.sync();  // the others may still read what belongs to the row before
    own_keys = team.share(divide_up(count, kRowBlock) * kRowBlock, kRowBlock);
    for (int64_t k = own_keys.begin; !direct && k < own_keys.end; k += kRowBlock) {
      const S* from[kRowBlock];
      for (int j = 0; j < kRowBlock; ++j) from[j] = key(k + j);
      write_exponentials(from, kRowBlock, in.attn_dim, w.keys + k * kLanes<T>, w.rows, w.key_size + k);
    }
  }

  // The exponentials of queries [first, first + n), n <= kQueryTile.
  void begin_tile(int64_t first, int64_t n) {
    q0 = first;
    queries = n;
    const Range own = team.share(n, kRowBlock);
    for (int64_t q = own.begin; !direct && q < own.end; q += kRowBlock) {
      const S* from[kRowBlock];
      const int rows = static_cast<int>(own.end - q < kRowBlock ? own.end - q : kRowBlock);
      for (int i = 0; i < rows; ++i) from[i] = query(q + i);
      write_exponentials(from, rows, in.attn_dim, w.query + q * kLanes<T>, kQueryTile, w.query_size + q);
    }
  }

  // Scores of the tile with this thread's keys; -inf where a pair takes no part.
  void score() {
    for (int64_t k = own_keys.begin; !direct && k < own_keys.end; k += kRowBlock) {
      for_each_block<kQueryBlock>(queries, [&](int64_t q, auto size) {
        Vec<T> sums[kRowBlock][size.value] = {};
        pair_sums<size.value>(w.query + q * kLanes<T>, w.keys + k * kLanes<T>, w.rows, w.v, w.vectors, sums);
        for (int j = 0; j < kRowBlock; ++j) {
          for (int i = 0; i < size.value; ++i) {
            w.scores[(k + j) * kQueryTile + q + i] = v_sum - T(2) * sum_lanes<T>(sums[j][i]);
          }
        }
      });
    }
    by_pair = direct || any_may_cancel();
    const bool masked = in.mask != nullptr && in.mask_query_stride != 0;
    if (!by_pair && !masked) return;
    for (int64_t k = own_keys.begin; k < own_keys.end && k < count; ++k) {
      for (int64_t q = 0; q < queries; ++q) {
        T& score = w.scores[k * kQueryTile + q];
        if (masked && !in.mask[b * in.mask_batch_stride + (q0 + q) * in.mask_query_stride + w.saved[k]]) {
          score = -infinity<T>();
        } else if (direct || may_cancel(w.query_size[q], w.key_size[k])) {
          Vec<T> sum{};
          for_each_vector<T>(in.attn_dim, [&](int64_t a, int lanes) {
            sum += load(w.v + a) * exact_reciprocal(query(q) + a, key(k) + a, lanes);
          });
          score = v_sum - T(2) * sum_lanes<T>(sum);
        }
      }
    }
  }

  const S* query(int64_t q) const { return in.query + (b * in.queries + q0 + q) * in.attn_dim; }
  // Of the saved keys, and beyond them the last.
  int64_t position(int64_t k) const { return b * in.keys + w.saved[k < count ? k : count - 1]; }
  const S* key(int64_t k) const { return in.key + position(k) * in.attn_dim; }
  const S* value(int64_t k) const { return in.values + position(k) * in.value_dim; }
  // The weight of a pair as it lies in tensors of [B, Tq, Tk].
  int64_t pair(int64_t q, int64_t k) const { return (b * in.queries + q0 + q) * in.keys + w.saved[k]; }

  const AdditiveAttentionInput<S>& in;
  const AdditiveWorkspace<T> w;
  const ThreadTeam team;
  // One query does not repay exponentials of the keys: each pair takes its own.
  const bool direct;
  int64_t b = 0;
  int64_t count = 0;    // keys that are saved
  int64_t q0 = 0;       // first query of the tile
  int64_t queries = 0;  // of the tile
  T v_sum = T(0);
  bool by_pair = false;  // some pair of the tile takes its own exponential
  Range own_keys{};      // whole blocks; those beyond `count` repeat the last

 private:
  bool any_may_cancel() const {
    T query_size = T(0), key_size = T(0);
    for (int64_t q = 0; q < queries; ++q) query_size = w.query_size[q] > query_size ? w.query_size[q] : query_size;
    for (int64_t k = 0; k < count; ++k) key_size = w.key_size[k] > key_size ? w.key_size[k] : key_size;
    return may_cancel(query_size, key_size);
  }

  void find_keys() {
    const int64_t length = in.key_lengths == nullptr ? in.keys : in.key_lengths[b];
    const int64_t mask_rows = in.mask_query_stride == 0 ? 1 : in.queries;
    count = 0;
    for (int64_t k = 0; k < length; ++k) {
      bool seen = in.mask == nullptr;
      for (int64_t q = 0; !seen && q < mask_rows; ++q) {
        seen = in.mask[b * in.mask_batch_stride + q * in.mask_query_stride + k];
      }
      if (seen) w.saved[count++] = static_cast<int32_t>(k);
    }
  }
};

// The softmax of a tile, each lane a query, and its log-sum-exp.
template <typename S, typename T = Compute<S>>
static inline void tile_softmax(const AdditiveRow<S>& row, T* lse) {
  for (int64_t q = 0; q < row.queries; q += kLanes<T>) {
    T* scores = row.w.scores + q;
    Vec<T> largest = broadcast(-infinity<T>());
    for (int64_t k = 0; k < row.count; ++k) {
      const Vec<T> score = load(scores + k * kQueryTile);
      largest = score > largest ? score : largest;
    }
    const Vec<T> shift = largest == -infinity<T>() ? Vec<T>{} : largest;
    Vec<T> sum{};
    for (int64_t k = 0; k < row.count; ++k) {
      const Vec<T> weight = vec_exp<T>(load(scores + k * kQueryTile) - shift);
      store(scores + k * kQueryTile, weight);
      sum += weight;
    }
    const Vec<T> scale = sum == T(0) ? Vec<T>{} : T(1) / sum;
    for (int64_t k = 0; k < row.count; ++k) {
      store(scores + k * kQueryTile, load(scores + k * kQueryTile) * scale);
    }
    for (int64_t i = 0; i < kLanes<T> && q + i < row.queries; ++i) lse[q + i] = shift[i] + scalar_log(sum[i]);
  }
}

// Means of values by the weights of queries q, q + 1, ...: columns from d on, `vectors` of them, of so many lanes.
template <int queries, int vectors, typename S>
static inline void weighted_means(const AdditiveRow<S>& row, int64_t q, int64_t d, int lanes, S* context) {
  using T = Compute<S>;
  Vec<T> sums[vectors][queries] = {};
  for (int64_t k = 0; k < row.count; ++k) {
    const S* values = row.value(k) + d;
    const T* weights = row.w.scores + k * kQueryTile + q;
#pragma GCC unroll 16
    for (int i = 0; i < vectors; ++i) {
      const Vec<T> value = load_part(values + i * kLanes<T>, lanes);
#pragma GCC unroll 8
      for (int j = 0; j < queries; ++j) sums[i][j] += weights[j] * value;
    }
  }
  for (int i = 0; i < vectors; ++i) {
    for (int j = 0; j < queries; ++j) {
      store_part(context + j * row.in.value_dim + d + i * kLanes<T>, sums[i][j], lanes);
    }
  }
}

// Weights from scores and their log-sum-exp, and gradients of the scores from those of the weights:
// ds = weight (dweight - sum of weight dweight).
template <typename S, typename T = Compute<S>>
static inline void tile_softmax_backward(const AdditiveRow<S>& row, const T* lse) {
  for (int64_t q = 0; q < row.queries; q += kLanes<T>) {
    T* scores = row.w.scores + q;
    T* dscores = row.w.dscores + q;
    const int lanes = static_cast<int>(row.queries - q < kLanes<T> ? row.queries - q : kLanes<T>);
    Vec<T> shift = load_part(lse + q, lanes);
    shift = shift == -infinity<T>() ? Vec<T>{} : shift;
    Vec<T> sum{};
    for (int64_t k = 0; k < row.count; ++k) {
      const Vec<T> weight = vec_exp<T>(load(scores + k * kQueryTile) - shift);
      store(scores + k * kQueryTile, weight);
      sum += weight * load(dscores + k * kQueryTile);
    }
    for (int64_t k = 0; k < row.count; ++k) {
      const Vec<T> weight = load(scores + k * kQueryTile);
      store(dscores + k * kQueryTile, weight * (load(dscores + k * kQueryTile) - sum));
    }
  }
}

// Whether a team works on one batch row at a time, and not each thread on rows of its own.
template <typename S>
static inline bool shares_rows(const AdditiveAttentionInput<S>& in, int threads) {
  return in.batch % threads != 0 && in.batch < 4 * threads;
}

// Calls run(row) for each batch row of this thread or of its team.
template <typename S, typename Row>
static inline void for_each_row(const AdditiveAttentionInput<S>& in, bool backward, Compute<S>* workspace,
                                const ThreadTeam& team, const Row& run) {
  const bool shared = shares_rows(in, team.size);
  const int64_t size = AdditiveWorkspace<Compute<S>>(in, backward).size();
  Compute<S>* own = workspace + team.rank * size;
  AdditiveRow<S> row(in, {in, backward, shared ? workspace : own, own}, shared ? team : ThreadTeam{0, 1, team.barrier},
                     backward);
  const Range batch = shared ? Range{0, in.batch} : team.share(in.batch);
  for (int64_t b = batch.begin; b < batch.end; ++b) {
    row.begin(b);
    run(row);
  }
}

template <typename S>
static int additive_threads(const AdditiveAttentionInput<S>& in, int threads) {
  const double pairs = static_cast<double>(in.queries) * in.keys + 3.0 * (in.queries + in.keys);
  return threads_worth(pairs * in.batch * in.attn_dim, kAdditiveWorkPerThread, threads);
}

// For each thread one: fewer may come than were asked for, and then share otherwise.
template <typename S>
static int64_t additive_forward_workspace(const AdditiveAttentionInput<S>& in, int threads) {
  return threads * AdditiveWorkspace<Compute<S>>(in, false).size();
}
template <typename S>
static int64_t additive_backward_workspace(const AdditiveAttentionInput<S>& in, int threads) {
  return threads * AdditiveWorkspace<Compute<S>>(in, true).size();
}

template <typename S>
static void additive_forward(const AdditiveAttentionForwardParams<S>& p, const ThreadTeam& team) {
  using T = Compute<S>;
  for_each_row(p.in, false, p.workspace, team, [&](AdditiveRow<S>& row) {
    const AdditiveAttentionInput<S>& in = row.in;
    const Range columns = row.team.share(in.value_dim, kLanes<T>);
    for (int64_t first = 0; first < in.queries; first += kQueryTile) {
      row.begin_tile(first, in.queries - first < kQueryTile ? in.queries - first : kQueryTile);
      row.team.sync();
      row.score();
      row.team.sync();
      const int64_t at = row.b * in.queries + first;
      if (row.team.rank == 0) tile_softmax(row, p.lse + at);
      row.team.sync();
      for_each_block<kWideBlock>(row.queries, [&](int64_t q, auto size) {
        // Fewer queries, more columns: values are read in longer runs.
        constexpr int kVectors = kColumnSums / size.value;
        S* context = p.context + (at + q) * in.value_dim;
        int64_t d = columns.begin;
        for (; d + kVectors * kLanes<T> <= columns.end; d += kVectors * kLanes<T>) {
          weighted_means<size.value, kVectors>(row, q, d, kLanes<T>, context);
        }
        for_each_vector<T>(columns.end - d,
                           [&](int64_t i, int lanes) { weighted_means<size.value, 1>(row, q, d + i, lanes, context); });
      });
      if (p.weights != nullptr && row.team.rank == 0) {
        zero(p.weights + at * in.keys, row.queries * in.keys);
        for (int64_t q = 0; q < row.queries; ++q) {
          for (int64_t k = 0; k < row.count; ++k) {
            store_part(p.weights + row.pair(q, k), broadcast(row.w.scores[k * kQueryTile + q]), 1);
          }
        }
      }
    }
  });
}

// What a tile adds to the gradients of queries, keys and v, of this thread's vectors of A.
template <typename S, typename T = Compute<S>>
static inline void tile_gradients(const AdditiveAttentionBackwardParams<S>& p, const AdditiveRow<S>& row,
                                  Range vectors) {
  const AdditiveAttentionInput<S>& in = row.in;
  const AdditiveWorkspace<T>& w = row.w;
  for (int64_t vector = vectors.begin; vector < vectors.end; ++vector) {
    const int64_t a = vector * kLanes<T>;
    const int lanes = static_cast<int>(in.attn_dim - a < kLanes<T> ? in.attn_dim - a : kLanes<T>);
    const T* keys = w.keys + a * w.rows;
    T* dkeys = w.dkeys + a * w.rows;
    Vec<T> to_v{};  // of the tile alone: sums of sums round less
    for_each_block<kRowBlock>(row.queries, [&](int64_t q, auto size) {
      Vec<T> queries[size.value], dqueries[size.value] = {};
#pragma GCC unroll 4
      for (int i = 0; i < size.value; ++i) queries[i] = load(w.query + a * kQueryTile + (q + i) * kLanes<T>);
      for (int64_t k = 0; k < row.count; ++k) {
        const Vec<T> key = load(keys + k * kLanes<T>);
        const T* dscores = w.dscores + k * kQueryTile + q;
        Vec<T> dkey = load(dkeys + k * kLanes<T>);
#pragma GCC unroll 4
        for (int i = 0; i < size.value; ++i) {
          const Vec<T> r = reciprocal<T>(queries[i] * key + T(1));
          const Vec<T> slope = r - r * r;
          dqueries[i] += dscores[i] * slope;
          dkey += dscores[i] * slope;
          to_v += dscores[i] * r;
        }
        store(dkeys + k * kLanes<T>, dkey);
      }
      for (int64_t k = 0; row.by_pair && k < row.count; ++k) {
        for (int i = 0; i < size.value; ++i) {
          if (!may_cancel(w.query_size[q + i], w.key_size[k])) continue;
          const T dscore = w.dscores[k * kQueryTile + q + i];
          const Vec<T> r = reciprocal<T>(queries[i] * load(keys + k * kLanes<T>) + T(1));
          const Vec<T> exact = exact_reciprocal(row.query(q + i) + a, row.key(k) + a, lanes);
          const Vec<T> change = dscore * ((exact - exact * exact) - (r - r * r));
          dqueries[i] += change;
          store(dkeys + k * kLanes<T>, load(dkeys + k * kLanes<T>) + change);
          to_v += dscore * (exact - r);
        }
      }
      if (p.dquery == nullptr) return;
      const Vec<T> factor = T(4) * load(w.v + a);
      for (int i = 0; i < size.value; ++i) {
        store_part(p.dquery + (row.b * in.queries + row.q0 + q + i) * in.attn_dim + a, factor * dqueries[i], lanes);
      }
    });
    store(w.dv + a, load(w.dv + a) + to_v);
  }
}

// Gradients of the weights of a tile with this thread's keys.
template <typename S, typename T = Compute<S>>
static inline void tile_dweights(const AdditiveAttentionBackwardParams<S>& p, const AdditiveRow<S>& row) {
  const AdditiveWorkspace<T>& w = row.w;
  for (int64_t k = row.own_keys.begin; k < row.own_keys.end; k += kRowBlock) {
    const S* values[kRowBlock];
    for (int j = 0; j < kRowBlock; ++j) values[j] = row.value(k + j);
    for_each_block<kQueryBlock>(row.queries, [&](int64_t q, auto size) {
      Vec<T> sums[kRowBlock][size.value] = {};
      pair_products<size.value>(w.grad + q * w.width, w.width, values, row.in.value_dim, sums);
      for (int j = 0; j < kRowBlock; ++j) {
        for (int i = 0; i < size.value; ++i) {
          w.dscores[(k + j) * kQueryTile + q + i] = sum_lanes<T>(sums[j][i]);
        }
      }
    });
    if (p.grad_weights == nullptr) continue;
    for (int64_t j = k; j < k + kRowBlock && j < row.count; ++j) {
      for (int64_t q = 0; q < row.queries; ++q) {
        w.dscores[j * kQueryTile + q] += read(p.grad_weights + row.pair(q, j));
      }
    }
  }
}

// The gradients of keys and values from the sums of all tiles; 0 for a key that no query sees.
template <typename S, typename T = Compute<S>>
static inline void row_gradients(const AdditiveAttentionBackwardParams<S>& p, const AdditiveRow<S>& row, Range vectors,
                                 Range columns) {
  const AdditiveAttentionInput<S>& in = row.in;
  const AdditiveWorkspace<T>& w = row.w;
  int64_t k = 0;
  for (int64_t position = 0; position < in.keys; ++position) {
    const bool saved = k < row.count && w.saved[k] == position;
    const int64_t at = row.b * in.keys + position;
    for (int64_t vector = vectors.begin; p.dkey != nullptr && vector < vectors.end; ++vector) {
      const int64_t a = vector * kLanes<T>;
      const int lanes = static_cast<int>(in.attn_dim - a < kLanes<T> ? in.attn_dim - a : kLanes<T>);
      const Vec<T> sum = saved ? T(4) * load(w.v + a) * load(w.dkeys + a * w.rows + k * kLanes<T>) : Vec<T>{};
      store_part(p.dkey + at * in.attn_dim + a, sum, lanes);
    }
    for_each_vector<T>(p.dvalues == nullptr ? 0 : columns.size(), [&](int64_t i, int lanes) {
      const int64_t d = columns.begin + i;
      store_part(p.dvalues + at * in.value_dim + d, saved ? load(w.dvalues + k * w.width + d) : Vec<T>{}, lanes);
    });
    k += saved;
  }
}

template <typename S>
static void additive_backward(const AdditiveAttentionBackwardParams<S>& p, const ThreadTeam& team) {
  using T = Compute<S>;
  const AdditiveWorkspace<T> own(p.in, true, nullptr,
                                 p.workspace + AdditiveWorkspace<T>(p.in, true).size() * team.rank);
  zero(own.dv, own.vectors * kLanes<T>);
  for_each_row(p.in, true, p.workspace, team, [&](AdditiveRow<S>& row) {
    const AdditiveAttentionInput<S>& in = row.in;
    const AdditiveWorkspace<T>& w = row.w;
    const Range columns = row.team.share(in.value_dim, kLanes<T>);
    const Range vectors = row.team.share(w.vectors);
    for (int64_t a = vectors.begin; a < vectors.end; ++a) zero(w.dkeys + a * w.rows * kLanes<T>, w.rows * kLanes<T>);
    for (int64_t k = 0; k < row.count; ++k) zero(w.dvalues + k * w.width + columns.begin, columns.size());
    for (int64_t first = 0; first < in.queries; first += kQueryTile) {
      if (first > 0) row.team.sync();  // the others may still read what belongs to the tile before
      row.begin_tile(first, in.queries - first < kQueryTile ? in.queries - first : kQueryTile);
      const int64_t at = row.b * in.queries + first;
      for (int64_t q = row.team.rank; q < row.queries; q += row.team.size) {
        T* grad = w.grad + q * w.width;
        zero(grad, w.width);
        if (p.grad_context != nullptr) convert(p.grad_context + (at + q) * in.value_dim, grad, in.value_dim);
      }
      row.team.sync();
      row.score();
      tile_dweights(p, row);
      row.team.sync();
      if (row.team.rank == 0) tile_softmax_backward(row, p.lse + at);
      row.team.sync();
      if (p.dvalues != nullptr) {
        for_each_block<kWideBlock>(row.count, [&](int64_t k, auto size) {
          for_each_vector<T>(columns.size(), [&](int64_t i, int) {
            const int64_t d = columns.begin + i;
            Vec<T> sums[size.value];
            for (int j = 0; j < size.value; ++j) sums[j] = load(w.dvalues + (k + j) * w.width + d);
            for (int64_t q = 0; q < row.queries; ++q) {
              const Vec<T> grad = load(w.grad + q * w.width + d);
#pragma GCC unroll 8
              for (int j = 0; j < size.value; ++j) sums[j] += w.scores[(k + j) * kQueryTile + q] * grad;
            }
            for (int j = 0; j < size.value; ++j) store(w.dvalues + (k + j) * w.width + d, sums[j]);
          });
        });
      }
      if (p.dquery != nullptr || p.dkey != nullptr || p.dv != nullptr) tile_gradients(p, row, vectors);
    }
    row_gradients(p, row, vectors, columns);
  });
  if (p.dv == nullptr) return;
  // The gradients of a row of scores sum to 0, so that those of tanh = 1 - 2 r are -2 times those of r.
  team.sync();
  const T* first = own.dv - team.rank * own.size();
  const Range columns = team.share(p.in.attn_dim, kLanes<T>);
  for_each_vector<T>(columns.size(), [&](int64_t i, int lanes) {
    const int64_t a = columns.begin + i;
    Vec<T> sum{};
    for (int rank = 0; rank < team.size; ++rank) sum += load(first + rank * own.size() + a);
    store_part(p.dv + a, T(-2) * sum, lanes);
  });
}

template <typename S>
static constexpr AdditiveAttentionKernels<S> kAdditiveAttentionKernels = {
    .threads = additive_threads<S>,
    .forward_workspace = additive_forward_workspace<S>,
    .backward_workspace = additive_backward_workspace<S>,
    .forward = additive_forward<S>,
    .backward = additive_backward<S>,
};

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
