// Attention pooling c = sum_t softmax_t(s) e_t and its causal prefix form. The limit is memory: each kernel goes
// through e once, a tile of rows at a time that stays in the first-level cache. docs/attention.md derives the formulas.
//
// A team shares the batch where it can; where the batch is smaller than the team, it shares time.
//
// S is what tensors are stored as, T what they are computed in. Sums, shares and the state are T throughout.
namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Rows of a tile: enough independent sums to hide the latency of a multiply-add, few enough for the registers.
// Pooling of B32 T128 D512 on Zen 3: 4 rows 120 us, 8 rows 111, 16 rows 187.
constexpr int kPoolTile = 8;
// The same of the backward pass, which keeps two sums a row.
constexpr int kPoolGradTile = 4;
// Elements that repay one more thread. On Zen 3 two threads take 2 us for the forward of B4 T16 D512, one takes 4.
constexpr double kPoolWorkPerThread = 1.0e4;

template <typename T>
static inline void zero(T* p, int64_t n) {
  __builtin_memset(p, 0, n * sizeof(T));
}

template <typename T>
static inline T scalar_exp(T x) {
  if constexpr (sizeof(T) == 4) return __builtin_expf(x);
  return __builtin_exp(x);
}
template <typename T>
static inline T scalar_log(T x) {
  if constexpr (sizeof(T) == 4) return __builtin_logf(x);
  return __builtin_log(x);
}
template <typename T>
static inline T scalar_log1p(T x) {
  if constexpr (sizeof(T) == 4) return __builtin_log1pf(x);
  return __builtin_log1p(x);
}

template <typename S>
static inline bool takes_part(const PoolInput<S>& in, int64_t b, int64_t t) {
  return (in.lengths == nullptr || t < in.lengths[b]) && (in.mask == nullptr || in.mask[b * in.steps + t]);
}

template <typename S>
static inline int64_t offset_of(const PoolInput<S>& in, int64_t b, int64_t t) {
  return b * in.e_batch_stride + t * in.e_step_stride;
}

template <typename A, typename B, typename T = Compute<A>>
static inline T dot(const A* a, const B* b, int64_t n) {
  Vec<T> sum{};
  for_each_vector<T>(n, [&](int64_t d, int lanes) { sum += load_part(a + d, lanes) * load_part(b + d, lanes); });
  return sum_lanes<T>(sum);
}

// The same of a whole tile of rows. Asks for the first half of the rows `next` meanwhile.
template <typename S, typename T = Compute<S>>
static inline void tile_dots(const S* const* rows, const S* const* next, const S* v, int64_t n, T* dots) {
  Vec<T> sums[kPoolTile] = {};
  for_each_vector<T>(n, [&](int64_t d, int lanes) {
    const Vec<T> value = load_part(v + d, lanes);
#pragma GCC unroll 8
    for (int j = 0; j < kPoolTile; ++j) sums[j] += value * load_part(rows[j] + d, lanes);
#pragma GCC unroll 8
    for (int j = 0; j < kPoolTile / 2; ++j) prefetch(next[j], d);
  });
  for (int j = 0; j < kPoolTile; ++j) dots[j] = sum_lanes<T>(sums[j]);
}

// `count` rows from t on, for memory to be asked for; of positions within the sequence.
template <typename S>
static inline void next_rows(const PoolInput<S>& in, int64_t b, int64_t t, int count, const S** rows) {
  for (int j = 0; j < count; ++j) rows[j] = in.e + offset_of(in, b, t + j < in.steps ? t + j : in.steps - 1);
}

// Scores of `count` positions t, all of which take part, and their rows.
template <typename S, typename T = Compute<S>>
static inline void tile_scores(const PoolInput<S>& in, int64_t b, const int64_t* t, const S* const* rows,
                               const S* const* next, int count, T* scores) {
  if (in.u == nullptr) {
    for (int j = 0; j < count; ++j) scores[j] = read(in.scores + b * in.steps + t[j]);
  } else if (count == kPoolTile) {
    tile_dots(rows, next, in.u, in.dim, scores);
  } else {
    for (int j = 0; j < count; ++j) scores[j] = dot(rows[j], in.u, in.dim);
  }
}

// Pools positions [range) of batch row b into c [D]; returns the log-sum-exp, -inf (and c = 0) if none takes part.
template <typename S, typename T = Compute<S>>
static T pool_range(const PoolInput<S>& in, int64_t b, Range range, T* c) {
  T max = -infinity<T>();
  T sum = T(0);
  for_each_vector<T>(in.dim, [&](int64_t d, int lanes) { store_part(c + d, Vec<T>{}, lanes); });
  int64_t t = range.begin;
  while (t < range.end) {
    int64_t steps[kPoolTile];
    const S* rows[kPoolTile];
    int count = 0;
    for (; t < range.end && count < kPoolTile; ++t) {
      if (!takes_part(in, b, t)) continue;
      steps[count] = t;
      rows[count++] = in.e + offset_of(in, b, t);
    }
    if (count == 0) break;
    constexpr int kPadded = kPoolTile > kLanes<T> ? kPoolTile : kLanes<T>;
    T weights[kPadded] = {};
    const S* next[kPoolTile];
    next_rows(in, b, t, kPoolTile, next);
    tile_scores(in, b, steps, rows, next, count, weights);
    T tile_max = max;
    for (int j = 0; j < count; ++j)
      tile_max = weights[j] > tile_max || weights[j] != weights[j] ? weights[j] : tile_max;
    if (tile_max == -infinity<T>()) continue;
    const T rescale = max == -infinity<T>() ? T(0) : scalar_exp(max - tile_max);
    max = tile_max;
    for (int j = 0; j < kPadded; j += kLanes<T>) store(weights + j, vec_exp<T>(load(weights + j) - max));
    sum *= rescale;
    for (int j = 0; j < count; ++j) sum += weights[j];
    if (count == kPoolTile) {
      for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
        Vec<T> value = load_part(c + d, lanes) * rescale;
#pragma GCC unroll 8
        for (int j = 0; j < kPoolTile; ++j) value += weights[j] * load_part(rows[j] + d, lanes);
        store_part(c + d, value, lanes);
#pragma GCC unroll 8
        for (int j = kPoolTile / 2; j < kPoolTile; ++j) prefetch(next[j], d);
      });
    } else {
      for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
        Vec<T> value = load_part(c + d, lanes) * rescale;
        for (int j = 0; j < count; ++j) value += weights[j] * load_part(rows[j] + d, lanes);
        store_part(c + d, value, lanes);
      });
    }
  }
  if (max == -infinity<T>()) return max;
  const T scale = T(1) / sum;
  for_each_vector<T>(in.dim, [&](int64_t d, int lanes) { store_part(c + d, load_part(c + d, lanes) * scale, lanes); });
  return max + scalar_log(sum);
}

// Adds the pooled vector (l2, c2) to the state (l, c).
template <typename T>
static inline void merge(int64_t dim, T* l, T* c, T l2, const T* c2) {
  if (l2 == -infinity<T>()) return;
  T share = T(1);
  if (*l == -infinity<T>()) {
    *l = l2;
  } else {
    const T high = *l > l2 ? *l : l2;
    const T low = *l > l2 ? l2 : *l;
    const T ratio = scalar_exp(low - high);
    share = (l2 == high ? T(1) : ratio) / (T(1) + ratio);
    *l = high + scalar_log1p(ratio);
  }
  for_each_vector<T>(dim, [&](int64_t d, int lanes) {
    const Vec<T> old = load_part(c + d, lanes);
    store_part(c + d, share == T(1) ? load_part(c2 + d, lanes) : old + share * (load_part(c2 + d, lanes) - old), lanes);
  });
}

template <typename S>
static int pool_threads(const PoolInput<S>& in, int threads) {
  return threads_worth(static_cast<double>(in.batch) * in.steps * in.dim, kPoolWorkPerThread, threads);
}

// A thread's own rows in the backward pass: its part of the gradient of u, and u and the gradient of c as T.
constexpr int kPoolGradRows = 3;

// Forward: what each thread pools, of each row of the batch where time is shared.
template <typename S>
static int64_t pool_workspace(const PoolInput<S>& in, int threads) {
  const int64_t rows = in.batch < threads && in.batch > kPoolGradRows ? in.batch : kPoolGradRows;
  return aligned(in.dim + 1) * threads * rows;
}

template <typename S, typename T = Compute<S>>
static void pool_forward(const PoolForwardParams<S>& p, const ThreadTeam& team) {
  const PoolInput<S>& in = p.in;
  const int64_t size = aligned(in.dim + 1);
  if (in.batch >= team.size) {
    const Range batch = team.share(in.batch);
    T* c = p.workspace + team.rank * size;
    for (int64_t b = batch.begin; b < batch.end; ++b) {
      p.lse[b] = pool_range(in, b, {0, in.steps}, c);
      convert(c, p.c + b * in.dim, in.dim);
    }
    return;
  }
  const Range steps = team.share(in.steps, kPoolTile);
  for (int64_t b = 0; b < in.batch; ++b) {
    T* partial = p.workspace + (b * team.size + team.rank) * size;
    partial[in.dim] = pool_range(in, b, steps, partial);
  }
  team.sync();
  if (team.rank != 0) return;
  for (int64_t b = 0; b < in.batch; ++b) {
    T* c = p.workspace + b * team.size * size;
    p.lse[b] = c[in.dim];
    for (int rank = 1; rank < team.size; ++rank) {
      const T* partial = c + rank * size;
      merge(in.dim, p.lse + b, c, partial[in.dim], partial);
    }
    convert(c, p.c + b * in.dim, in.dim);
  }
}

// du = sum over threads of their partial gradients at workspace + rank * stride, always in the same order.
template <typename S, typename T = Compute<S>>
static inline void reduce_du(int64_t dim, const T* partial, int64_t stride, S* du, const ThreadTeam& team) {
  team.sync();
  const Range columns = team.share(dim, kLanes<T>);
  for_each_vector<T>(columns.size(), [&](int64_t i, int lanes) {
    const int64_t d = columns.begin + i;
    Vec<T> sum{};
    for (int rank = 0; rank < team.size; ++rank) sum += load_part(partial + rank * stride + d, lanes);
    store_part(du + d, sum, lanes);
  });
}

// What the backward pass of one batch row needs, as T: zeros where there is none.
template <typename T>
struct PoolGrad {
  T lse, g_lse;
  T g_c;       // g . c
  const T* g;  // [D] gradient of c
  const T* u;  // [D]
  T* du;       // [D], added to
  T excess;    // sum of alpha (g . e - g . c), added to: 0 but for the rounding of c, if over all positions
};

// N positions of batch row b, their rows of e, and rows to ask for meanwhile.
template <typename S, int N, typename T = Compute<S>>
static inline void pool_backward_tile(const PoolBackwardParams<S>& p, int64_t b, const int64_t* t, const S* const* rows,
                                      const S* const* next, PoolGrad<T>* grad) {
  const PoolInput<S>& in = p.in;
  const T* u_row = grad->u;
  const T* g_row = grad->g;
  T* du = grad->du;
  Vec<T> with_u[N] = {}, with_g[N] = {};
  for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
    const Vec<T> u = load_part(u_row + d, lanes), g = load_part(g_row + d, lanes);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const Vec<T> e = load_part(rows[j] + d, lanes);
      with_u[j] += e * u;
      with_g[j] += e * g;
      prefetch(next[j], d);
    }
  });
  constexpr int kPadded = N > kLanes<T> ? N : kLanes<T>;
  T alpha[kPadded] = {}, ds[N];
  for (int j = 0; j < N; ++j) {
    alpha[j] = (in.u == nullptr ? read(in.scores + b * in.steps + t[j]) : sum_lanes<T>(with_u[j])) - grad->lse;
  }
  for (int j = 0; j < kPadded; j += kLanes<T>) store(alpha + j, vec_exp<T>(load(alpha + j)));
  for (int j = 0; j < N; ++j) {
    const T slope = alpha[j] * (sum_lanes<T>(with_g[j]) - grad->g_c);
    grad->excess += slope;
    ds[j] = slope + alpha[j] * grad->g_lse;
    if (p.dscores != nullptr) convert(ds + j, p.dscores + b * in.steps + t[j], 1);
  }
  if (p.du != nullptr) {
    for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
      Vec<T> sum = load_part(du + d, lanes);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum += ds[j] * load_part(rows[j] + d, lanes);
      store_part(du + d, sum, lanes);
    });
  }
  // One row after the other: stores to several rows in turn are slower.
  for (int j = 0; j < N && p.de != nullptr; ++j) {
    S* de = p.de + offset_of(in, b, t[j]);
    const T a = alpha[j], slope = ds[j];
    for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
      store_part(de + d, a * load_part(g_row + d, lanes) + slope * load_part(u_row + d, lanes), lanes);
    });
  }
}

template <typename S, typename T = Compute<S>>
static void pool_backward_range(const PoolBackwardParams<S>& p, int64_t b, Range range, PoolGrad<T>* grad) {
  const PoolInput<S>& in = p.in;
  for (int64_t t = range.begin; t < range.end;) {
    int64_t steps[kPoolGradTile];
    const S* rows[kPoolGradTile];
    int count = 0;
    for (; t < range.end && count < kPoolGradTile; ++t) {
      if (takes_part(in, b, t) && grad->lse != -infinity<T>()) {
        steps[count] = t;
        rows[count++] = in.e + offset_of(in, b, t);
        continue;
      }
      if (p.de != nullptr) zero(p.de + offset_of(in, b, t), in.dim);
      if (p.dscores != nullptr) zero(p.dscores + b * in.steps + t, 1);
    }
    const S* next[kPoolGradTile];
    next_rows(in, b, t + kPoolGradTile, kPoolGradTile, next);
    if (count == kPoolGradTile) {
      pool_backward_tile<S, kPoolGradTile>(p, b, steps, rows, next, grad);
    } else {
      for (int j = 0; j < count; ++j) pool_backward_tile<S, 1>(p, b, steps + j, rows + j, next, grad);
    }
  }
}

template <typename S, typename T = Compute<S>>
static void pool_backward(const PoolBackwardParams<S>& p, const ThreadTeam& team) {
  const PoolInput<S>& in = p.in;
  const int64_t size = aligned(in.dim + 1);
  T* du = p.workspace + team.rank * kPoolGradRows * size;
  T* u = du + size;
  T* g = du + 2 * size;
  zero(du, in.dim);
  in.u == nullptr ? zero(u, in.dim) : convert(in.u, u, in.dim);
  const bool share_batch = in.batch >= team.size;
  const Range batch = share_batch ? team.share(in.batch) : Range{0, in.batch};
  const Range steps = share_batch ? Range{0, in.steps} : team.share(in.steps, kPoolTile);
  for (int64_t b = batch.begin; b < batch.end; ++b) {
    const S* c = p.c + b * in.dim;
    p.grad_c == nullptr ? zero(g, in.dim) : convert(p.grad_c + b * in.dim, g, in.dim);
    const T g_lse = p.grad_lse == nullptr ? T(0) : p.grad_lse[b];
    PoolGrad<T> grad = {p.lse[b], g_lse, dot(g, c, in.dim), g, u, du, T(0)};
    pool_backward_range(p, b, steps, &grad);
    if constexpr (kIsNarrow<S>) {
      // c was rounded, and with it g . c, by the same error in all ds: in the sum du it would add up to that times c.
      for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
        store_part(du + d, load_part(du + d, lanes) - grad.excess * load_part(c + d, lanes), lanes);
      });
    }
  }
  if (p.du != nullptr) reduce_du(in.dim, p.workspace, kPoolGradRows * size, p.du, team);
}

// ---- the causal prefix form: a_t = sigmoid(s_t - l), l <- logaddexp(l, s_t), c <- c + a_t (e_t - c)
//
// A team shares the batch. Where that does not come out even it shares time, block by block: each thread goes through
// its chunk of the block alone, keeping only what comes out at its end; then all learn what goes in at their beginning,
// and go through the chunk again, now for the results. What a chunk does to the state before it is known from its
// summary alone, so this is exact. docs/attention.md has the formulas.

// A score that exceeds all before it by more than this could make their share of the state underflow.
constexpr double kSafeRise = 60.0;
// Rows of a tile of the backward pass: each keeps two dot products in registers.
constexpr int kPrefixGradTile = 4;
// Elements of e in one thread's chunk of a block: read twice, so that it must stay in the cache.
// B1 T8192 D512 on Zen 3, forward: 8 thousand 1.6 ms, 16 to 64 thousand 1.2 to 1.4.
constexpr int64_t kChunkElements = 32768;

template <typename S>
static inline bool shares_time(const PoolInput<S>& in, int threads) {
  return in.batch % threads != 0 && in.batch < 4 * threads;
}

static inline int64_t chunk_steps(int64_t dim) {
  const int64_t steps = kChunkElements / (dim > 0 ? dim : 1) / kPoolTile * kPoolTile;
  return steps > kPoolTile ? steps : kPoolTile;
}

// A thread's own rows: the state, one that belongs to its chunk, the gradient of u, zeros. Then two sets of one
// summary a thread: sets alternate, so that one barrier a block is enough. All of D + 2 elements. Last, what the
// backward pass keeps of each position of a thread's chunk.
constexpr int kPrefixRows = 4;

template <typename S>
static int64_t prefix_pool_workspace(const PoolInput<S>& in, int threads) {
  return threads * ((kPrefixRows + 2) * aligned(in.dim + 2) + aligned(chunk_steps(in.dim)));
}

// Scores of n <= kPoolTile positions from t on; -inf where a position takes no part.
template <typename S, typename T = Compute<S>>
static inline void prefix_scores(const PoolInput<S>& in, int64_t b, int64_t t, int n, T* scores) {
  int64_t steps[kPoolTile];
  const S* rows[kPoolTile];
  int count = 0;
  for (int j = 0; j < n; ++j) {
    if (!takes_part(in, b, t + j)) continue;
    steps[count] = t + j;
    rows[count++] = in.e + offset_of(in, b, t + j);
  }
  T found[kPoolTile];
  tile_scores(in, b, steps, rows, rows, count, found);
  for (int j = 0, next = 0; j < n; ++j) {
    scores[j] = next < count && steps[next] == t + j ? found[next++] : -infinity<T>();
  }
}

// From N scores and the state's l, which is updated: the share of each position (a) and of the state before it (1 - a).
// A score of -inf is that of a position that takes no part.
template <typename T, int N>
static inline void prefix_shares(const T* scores, T* l, T* keep, T* share) {
  T max = *l;
  for (int j = 0; j < N; ++j) max = scores[j] > max ? scores[j] : max;
  const T base = *l > scores[0] ? *l : scores[0];
  if (N > 1 && max - base < T(kSafeRise)) {
    // The whole tile relative to its largest score: the exponentials all at once.
    constexpr int kPadded = N > kLanes<T> ? N : kLanes<T>;
    T weights[kPadded] = {};
    for (int j = 0; j < N; ++j) weights[j] = scores[j];
    for (int j = 0; j < kPadded; j += kLanes<T>) store(weights + j, vec_exp<T>(load(weights + j) - max));
    T sum = scalar_exp(*l - max);
    for (int j = 0; j < N; ++j) {
      const T before = sum;
      sum += weights[j];
      const T inverse = T(1) / sum;
      keep[j] = before * inverse;
      share[j] = weights[j] * inverse;
    }
    *l = max + scalar_log(sum);
    return;
  }
  for (int j = 0; j < N; ++j) {
    const T s = scores[j];
    keep[j] = T(1);
    share[j] = T(0);
    if (s == -infinity<T>()) continue;
    const bool falls = *l > s;
    const T high = falls ? *l : s;
    const T ratio = scalar_exp((falls ? s : *l) - high);  // 0 from an empty state
    const T larger = T(1) / (T(1) + ratio);
    keep[j] = falls ? larger : ratio * larger;
    share[j] = falls ? ratio * larger : larger;
    *l = high + scalar_log1p(ratio);
  }
}

// The state c through N rows of e, all of which take part, and into N rows of c_rows, unless that is null. Asks for the
// rows that lie `ahead` elements after them, unless that is 0.
template <typename S, int N, typename T = Compute<S>>
static inline void prefix_rows(const S* e, S* c_rows, int64_t stride, int64_t ahead, int64_t dim, const T* keep,
                               const T* share, T* c) {
  for_each_vector<T>(dim, [&](int64_t d, int lanes) {
    Vec<T> state = load_part(c + d, lanes);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      // In this order the chain from row to row is one multiply-add.
      state = keep[j] * state + share[j] * load_part(e + j * stride + d, lanes);
      if (c_rows != nullptr) store_part(c_rows + j * stride + d, state, lanes);
      if (ahead != 0) prefetch(e + j * stride + ahead, d);
    }
    store_part(c + d, state, lanes);
  });
}

// What a pass over a range of positions does: all at once, or first its summary and then its results.
enum class Pass { kWhole, kSummary, kResults };

// Positions [range) of batch row b from the state (l, c), which is updated. Between the two passes p.share holds
// scores. The rows of so many steps `ahead` are asked for meanwhile.
template <typename S, Pass pass, typename T = Compute<S>>
static void prefix_range(const PrefixPoolForwardParams<S>& p, int64_t b, Range range, int64_t ahead, T* l, T* c) {
  const PoolInput<S>& in = p.in;
  const int64_t stride = in.e_step_stride;
  for (int64_t t = range.begin; t < range.end; t += kPoolTile) {
    const int n = static_cast<int>(range.end - t < kPoolTile ? range.end - t : kPoolTile);
    const S* e = in.e + offset_of(in, b, t);
    S* c_rows = pass == Pass::kSummary ? nullptr : p.c + offset_of(in, b, t);
    T* scores = p.share + b * in.steps + t;
    if (pass != Pass::kResults) prefix_scores(in, b, t, n, scores);
    bool whole = n == kPoolTile;
    for (int j = 0; j < n; ++j) whole = whole && scores[j] != -infinity<T>();
    T keep[kPoolTile], share[kPoolTile];
    if (whole) {
      prefix_shares<T, kPoolTile>(scores, l, keep, share);
      const int64_t next = t + ahead + kPoolTile <= in.steps ? ahead * stride : 0;
      prefix_rows<S, kPoolTile>(e, c_rows, stride, next, in.dim, keep, share, c);
    } else {
      for (int j = 0; j < n; ++j) {
        S* c_row = c_rows == nullptr ? nullptr : c_rows + j * stride;
        prefix_shares<T, 1>(scores + j, l, keep + j, share + j);
        if (scores[j] != -infinity<T>()) {
          prefix_rows<S, 1>(e + j * stride, c_row, 0, 0, in.dim, keep + j, share + j, c);
        } else if (c_row != nullptr) {
          convert(c, c_row, in.dim);
        }
      }
    }
    if (pass != Pass::kSummary) convert(share, scores, n);
  }
}

template <typename S, typename T = Compute<S>>
static void prefix_pool_forward(const PrefixPoolForwardParams<S>& p, const ThreadTeam& team) {
  const PoolInput<S>& in = p.in;
  const int64_t size = aligned(in.dim + 2);
  const bool by_time = shares_time(in, team.size);
  const Range batch = by_time ? Range{0, in.batch} : team.share(in.batch);
  T* c = p.workspace + team.rank * kPrefixRows * size;
  T* chunk_c = c + size;
  T* sets = p.workspace + team.size * kPrefixRows * size;
  int turn = 0;
  for (int64_t b = batch.begin; b < batch.end; ++b) {
    T l = p.l0 == nullptr ? -infinity<T>() : p.l0[b];
    if (p.c0 == nullptr) {
      zero(c, in.dim);
    } else {
      convert(p.c0 + b * in.dim, c, in.dim);
    }
    if (!by_time) prefix_range<S, Pass::kWhole>(p, b, {0, in.steps}, kPoolTile, &l, c);
    const int64_t block = chunk_steps(in.dim) * team.size;
    for (int64_t start = 0; by_time && start < in.steps; start += block) {
      const Range share = team.share(in.steps - start < block ? in.steps - start : block, kPoolTile);
      const Range chunk = {start + share.begin, start + share.end};
      T* summaries = sets + turn * team.size * size;
      T* mine = summaries + team.rank * size;
      zero(mine, in.dim);
      mine[in.dim] = -infinity<T>();
      prefix_range<S, Pass::kSummary>(p, b, chunk, 0, mine + in.dim, mine);
      team.sync();
      T chunk_l = l;
      for (int rank = 0; rank < team.size; ++rank) {
        if (rank == team.rank) {
          chunk_l = l;
          convert(c, chunk_c, in.dim);
        }
        merge(in.dim, &l, c, summaries[rank * size + in.dim], summaries + rank * size);
      }
      prefix_range<S, Pass::kResults>(p, b, chunk, block, &chunk_l, chunk_c);
      turn ^= 1;
    }
    if (!by_time || team.rank == 0) {
      p.l_n[b] = l;
      convert(c, p.c_n + b * in.dim, in.dim);
    }
  }
}

// What the positions after a range hand back to it: gradient of the state, and its product with the state.
template <typename T>
struct Carried {
  T* g;  // [D]
  T k;
};

// N positions from t on, first to last: grad_c . c of each into `products`. The state c before them comes in and the
// one after them goes out: to compute it again from e, which is needed anyway, is less work than to read all its rows.
// With kSummary, adds what the positions hand back to those before them to `out`; *through is their share so far.
template <typename S, int N, bool kSummary, typename T = Compute<S>>
static inline void prefix_products_tile(const PrefixPoolBackwardParams<S>& p, int64_t b, int64_t t, T* c, T* products,
                                        Carried<T>* out, T* through, const S* zeros) {
  const PoolInput<S>& in = p.in;
  const int64_t stride = in.e_step_stride;
  const int64_t grad_stride = p.grad_c == nullptr ? 0 : stride;
  const S* grad_c = p.grad_c == nullptr ? zeros : p.grad_c + offset_of(in, b, t);
  const T* a = p.share + b * in.steps + t;
  const S* e = N == 1 && *a == T(0) ? zeros : in.e + offset_of(in, b, t);
  T keep[N], passed[N];
  for (int j = 0; j < N; ++j) {
    keep[j] = T(1) - a[j];
    *through *= keep[j];
    passed[j] = *through;
  }
  Vec<T> sums[N] = {};
  for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
    Vec<T> state = load_part(c + d, lanes);
    Vec<T> handed{};
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const Vec<T> grad = load_part(grad_c + j * grad_stride + d, lanes);
      state = keep[j] * state + a[j] * load_part(e + j * stride + d, lanes);
      sums[j] += grad * state;
      if (kSummary) handed += passed[j] * grad;
    }
    store_part(c + d, state, lanes);
    if (kSummary) store_part(out->g + d, load_part(out->g + d, lanes) + handed, lanes);
  });
  for (int j = 0; j < N; ++j) {
    products[j] = sum_lanes<T>(sums[j]);
    if (kSummary) out->k += passed[j] * products[j];
  }
}

// The same of positions [range). Returns the share that what comes from after the range has in what goes out of it.
template <typename S, bool kSummary, typename T = Compute<S>>
static T prefix_products(const PrefixPoolBackwardParams<S>& p, int64_t b, Range range, T* c, T* products,
                         Carried<T>* out, const S* zeros) {
  const T* share = p.share + b * p.in.steps;
  T through = T(1);
  for (int64_t t = range.begin; t < range.end;) {
    bool whole = t + kPoolTile <= range.end;
    for (int j = 0; whole && j < kPoolTile; ++j) whole = share[t + j] != T(0);
    T* into = products + (t - range.begin);
    if (whole) {
      prefix_products_tile<S, kPoolTile, kSummary>(p, b, t, c, into, out, &through, zeros);
    } else {
      prefix_products_tile<S, 1, kSummary>(p, b, t, c, into, out, &through, zeros);
    }
    t += whole ? kPoolTile : 1;
  }
  return through;
}

// N positions of batch row b, t being the last of them: entry j is position t - j, products[-j] its grad_c . c.
// `carried` comes in from the positions after them, already times their share of the state, and goes out to those
// before in the same form. Two scans: the first for the dot products from which the gradients of the scores follow, the
// second for the results. The rows of so many steps before, `ahead`, are asked for meanwhile.
template <typename S, int N, typename T = Compute<S>>
static inline void prefix_backward_tile(const PrefixPoolBackwardParams<S>& p, int64_t b, int64_t t, int64_t ahead,
                                        const T* products, Carried<T>* carried, T* du, const S* zeros) {
  const PoolInput<S>& in = p.in;
  const int64_t stride = in.e_step_stride;
  // grad_c may be missing: then each row of it is the one of zeros. A position that takes no part has no e.
  const int64_t grad_stride = p.grad_c == nullptr ? 0 : stride;
  const S* grad_c = p.grad_c == nullptr ? zeros : p.grad_c + offset_of(in, b, t);
  const T* share = p.share + b * in.steps + t;
  const S* e = N == 1 && *share == T(0) ? zeros : in.e + offset_of(in, b, t);
  T* state_row = carried->g;
  const int64_t next = t - N + 1 - ahead >= 0 ? ahead * stride : 0;
  const int64_t next_grad = next == 0 || p.grad_c == nullptr ? 0 : next;
  T keep[N], a[N], ds[N];
  for (int j = 0; j < N; ++j) {
    a[j] = share[-j];
    keep[j] = T(1) - a[j];
  }

  Vec<T> with_e[N] = {};
  for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
    Vec<T> state = load_part(state_row + d, lanes);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      state += load_part(grad_c - j * grad_stride + d, lanes);
      with_e[j] += state * load_part(e - j * stride + d, lanes);
      state *= keep[j];
      if (N > 1) prefetch(e - j * stride - next, d);
    }
  });
  for (int j = 0; j < N; ++j) {
    const T k = products[-j] + carried->k;
    ds[j] = a[j] == T(0) ? T(0) : a[j] * (sum_lanes<T>(with_e[j]) - k);
    carried->k = keep[j] * k;
  }

  if (p.dscores != nullptr) {
    for (int j = 0; j < N; ++j) convert(ds + j, p.dscores + b * in.steps + t - j, 1);
  }
  const S* u = in.u == nullptr ? zeros : in.u;
  S* de = p.de == nullptr ? nullptr : p.de + offset_of(in, b, t);
  for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
    Vec<T> state = load_part(state_row + d, lanes);
    Vec<T> sum = load_part(du + d, lanes);
    const Vec<T> score_vector = load_part(u + d, lanes);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      state += load_part(grad_c - j * grad_stride + d, lanes);
      sum += ds[j] * load_part(e - j * stride + d, lanes);
      if (de != nullptr) store_part(de - j * stride + d, a[j] * state + ds[j] * score_vector, lanes);
      state *= keep[j];
      if (N > 1) prefetch(grad_c - j * grad_stride - next_grad, d);
    }
    store_part(state_row + d, state, lanes);
    store_part(du + d, sum, lanes);
  });
}

// Positions [range) of batch row b, last first; `products` begins with that of the first.
template <typename S, typename T = Compute<S>>
static void prefix_backward_range(const PrefixPoolBackwardParams<S>& p, int64_t b, Range range, int64_t ahead,
                                  const T* products, Carried<T>* carried, T* du, const S* zeros) {
  const T* share = p.share + b * p.in.steps;
  for (int64_t t = range.end - 1; t >= range.begin;) {
    bool whole = t - kPrefixGradTile + 1 >= range.begin;
    for (int j = 0; whole && j < kPrefixGradTile; ++j) whole = share[t - j] != T(0);
    const T* product = products + (t - range.begin);
    if (whole) {
      prefix_backward_tile<S, kPrefixGradTile>(p, b, t, ahead, product, carried, du, zeros);
    } else {
      prefix_backward_tile<S, 1>(p, b, t, ahead, product, carried, du, zeros);
    }
    t -= whole ? kPrefixGradTile : 1;
  }
}

template <typename S, typename T = Compute<S>>
static void prefix_pool_backward(const PrefixPoolBackwardParams<S>& p, const ThreadTeam& team) {
  const PoolInput<S>& in = p.in;
  const int64_t size = aligned(in.dim + 2);
  const bool by_time = shares_time(in, team.size);
  const Range batch = by_time ? Range{0, in.batch} : team.share(in.batch);
  T* state = p.workspace + team.rank * kPrefixRows * size;
  T* row = state + size;
  T* du = state + 2 * size;
  T* zeros = state + 3 * size;
  const S* no_row = reinterpret_cast<const S*>(zeros);
  T* sets = p.workspace + team.size * kPrefixRows * size;
  T* products = sets + 2 * team.size * size + team.rank * aligned(chunk_steps(in.dim));
  int turn = 0;
  zero(du, in.dim);
  zero(zeros, in.dim);
  for (int64_t b = batch.begin; b < batch.end; ++b) {
    const T* c0 = p.c0 == nullptr ? zeros : p.c0 + b * in.dim;
    const auto copy_c_before = [&](int64_t t, T* to) {
      t == 0 ? convert(c0, to, in.dim) : convert(p.c + offset_of(in, b, t - 1), to, in.dim);
    };
    Carried<T> carried = {state, p.grad_l_n == nullptr ? T(0) : -p.grad_l_n[b]};
    if (p.grad_c_n == nullptr) {
      zero(state, in.dim);
    } else {
      convert(p.grad_c_n + b * in.dim, state, in.dim);
      copy_c_before(in.steps, row);
      carried.k += dot(state, row, in.dim);
    }
    const int64_t block = chunk_steps(in.dim) * (by_time ? team.size : 1);
    for (int64_t end = in.steps; end > 0; end -= block) {
      const int64_t count = end < block ? end : block;
      const Range share = by_time ? team.share(count, kPoolTile) : Range{0, count};
      const Range chunk = {end - count + share.begin, end - count + share.end};
      copy_c_before(chunk.begin, row);
      if (!by_time) {
        prefix_products<S, false, T>(p, b, chunk, row, products, nullptr, no_row);
        prefix_backward_range(p, b, chunk, block, products, &carried, du, no_row);
        continue;
      }
      T* summaries = sets + turn * team.size * size;
      T* mine = summaries + team.rank * size;
      zero(mine, in.dim);
      Carried<T> out = {mine, T(0)};
      mine[in.dim] = prefix_products<S, true>(p, b, chunk, row, products, &out, no_row);
      mine[in.dim + 1] = out.k;
      team.sync();
      Carried<T> into = {row, T(0)};
      for (int rank = team.size - 1; rank >= 0; --rank) {
        if (rank == team.rank) {
          convert(state, into.g, in.dim);
          into.k = carried.k;
        }
        const T* summary = summaries + rank * size;
        const T through = summary[in.dim];
        for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
          store_part(state + d, load_part(summary + d, lanes) + through * load_part(state + d, lanes), lanes);
        });
        carried.k = summary[in.dim + 1] + through * carried.k;
      }
      prefix_backward_range(p, b, chunk, block, products, &into, du, no_row);
      turn ^= 1;
    }
    if (!by_time || team.rank == 0) {
      if (p.dl0 != nullptr) p.dl0[b] = dot(state, c0, in.dim) - carried.k;
      if (p.dc0 != nullptr) convert(state, p.dc0 + b * in.dim, in.dim);
    }
  }
  if (p.du != nullptr) reduce_du(in.dim, p.workspace + 2 * size, kPrefixRows * size, p.du, team);
}

template <typename S>
static constexpr PoolKernels<S> kPoolKernels = {
    .threads = pool_threads<S>,
    .workspace = pool_workspace<S>,
    .forward = pool_forward<S>,
    .backward = pool_backward<S>,
    .prefix_workspace = prefix_pool_workspace<S>,
    .prefix_forward = prefix_pool_forward<S>,
    .prefix_backward = prefix_pool_backward<S>,
};

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
