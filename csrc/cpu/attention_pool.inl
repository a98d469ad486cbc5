// Attention pooling c = sum_t softmax_t(s) e_t and its causal prefix form. The limit is memory: each kernel goes
// through e once, a tile of rows at a time that stays in the first-level cache. docs/attention.md derives the formulas.
//
// A team shares the batch where it can; where the batch is smaller than the team, it shares time.
namespace llm_ext {
namespace LLM_EXT_LEVEL {

// Rows of a tile: enough independent sums to hide the latency of a multiply-add, few enough for the registers.
constexpr int kPoolTile = 8;
constexpr int kPrefixGradTile = 4;
// Elements that repay one more thread, some 3 us.
constexpr double kPoolWorkPerThread = 3.0e4;
// Elements of e in one thread's part of a block of the chunked scan: read twice, so that it must stay in the cache.
constexpr int64_t kChunkElements = 32768;  // 128 KB of floats; not tuned yet

// Results from this size on are written past the cache.
constexpr int64_t kStreamBytes = 12 << 20;

template <typename T>
static inline void zero(T* p, int64_t n) {
  __builtin_memset(p, 0, n * sizeof(T));
}

template <typename T>
static inline void copy(T* to, const T* from, int64_t n) {
  __builtin_memcpy(to, from, n * sizeof(T));
}

template <typename T>
static inline T infinity() {
  return T(__builtin_inf());
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

template <typename T>
static inline bool takes_part(const PoolInput<T>& in, int64_t b, int64_t t) {
  return (in.lengths == nullptr || t < in.lengths[b]) && (in.mask == nullptr || in.mask[b * in.steps + t]);
}

// Whether [begin, end) lies before `limit` and every position of it takes part.
template <typename T>
static inline bool all_take_part(const PoolInput<T>& in, int64_t b, int64_t begin, int64_t end, int64_t limit) {
  if (end > limit || (in.lengths != nullptr && end > in.lengths[b])) return false;
  for (int64_t t = begin; in.mask != nullptr && t < end; ++t) {
    if (!in.mask[b * in.steps + t]) return false;
  }
  return true;
}

template <typename T>
static inline int64_t offset_of(const PoolInput<T>& in, int64_t b, int64_t t) {
  return b * in.e_batch_stride + t * in.e_step_stride;
}

// Scores of `count` rows.
template <typename T>
static inline void tile_scores(const PoolInput<T>& in, int64_t b, const int64_t* t, const T* const* rows, int count,
                               T* scores) {
  if (in.u == nullptr) {
    for (int j = 0; j < count; ++j) scores[j] = in.scores[b * in.steps + t[j]];
    return;
  }
  if (count == kPoolTile) {
    Vec<T> sums[kPoolTile] = {};
    for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
      const Vec<T> u = load_part(in.u + d, lanes);
#pragma GCC unroll 8
      for (int j = 0; j < kPoolTile; ++j) sums[j] += u * load_part(rows[j] + d, lanes);
    });
    for (int j = 0; j < kPoolTile; ++j) scores[j] = sum_lanes<T>(sums[j]);
    return;
  }
  for (int j = 0; j < count; ++j) {
    Vec<T> sum{};
    for_each_vector<T>(
        in.dim, [&](int64_t d, int lanes) { sum += load_part(in.u + d, lanes) * load_part(rows[j] + d, lanes); });
    scores[j] = sum_lanes<T>(sum);
  }
}

template <typename T>
static inline T dot(const T* a, const T* b, int64_t n) {
  Vec<T> sum{};
  for_each_vector<T>(n, [&](int64_t d, int lanes) { sum += load_part(a + d, lanes) * load_part(b + d, lanes); });
  return sum_lanes<T>(sum);
}

// Pools positions [range) of batch row b into c [D]; returns the log-sum-exp, -inf (and c = 0) if none takes part.
template <typename T>
static T pool_range(const PoolInput<T>& in, int64_t b, Range range, T* c) {
  T max = -infinity<T>();
  T sum = T(0);
  for_each_vector<T>(in.dim, [&](int64_t d, int lanes) { store_part(c + d, Vec<T>{}, lanes); });
  int64_t t = range.begin;
  while (t < range.end) {
    int64_t steps[kPoolTile];
    const T* rows[kPoolTile];
    int count = 0;
    for (; t < range.end && count < kPoolTile; ++t) {
      if (!takes_part(in, b, t)) continue;
      steps[count] = t;
      rows[count++] = in.e + offset_of(in, b, t);
    }
    if (count == 0) break;
    constexpr int kPadded = kPoolTile > kLanes<T> ? kPoolTile : kLanes<T>;
    T weights[kPadded] = {};
    tile_scores(in, b, steps, rows, count, weights);
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

template <typename T>
static int pool_threads(const PoolInput<T>& in, int threads) {
  const double useful = static_cast<double>(in.batch) * in.steps * in.dim / kPoolWorkPerThread;
  return useful >= threads ? threads : (useful < 1 ? 1 : static_cast<int>(useful));
}

// Forward: partial results where time is shared. Backward: one gradient of u a thread.
template <typename T>
static int64_t pool_workspace(const PoolInput<T>& in, int threads) {
  return aligned(in.dim + 1) * threads * (in.batch < threads ? in.batch + 1 : 1);
}

template <typename T>
static void pool_forward(const PoolForwardParams<T>& p, const Team& team) {
  const PoolInput<T>& in = p.in;
  if (in.batch >= team.size) {
    const Range batch = team.share(in.batch);
    for (int64_t b = batch.begin; b < batch.end; ++b) {
      p.lse[b] = pool_range(in, b, {0, in.steps}, p.c + b * in.dim);
    }
    return;
  }
  const int64_t size = aligned(in.dim + 1);
  const Range steps = team.share(in.steps, kPoolTile);
  for (int64_t b = 0; b < in.batch; ++b) {
    T* partial = p.workspace + (b * team.size + team.rank) * size;
    partial[in.dim] = pool_range(in, b, steps, partial);
  }
  team.sync();
  if (team.rank != 0) return;
  for (int64_t b = 0; b < in.batch; ++b) {
    const T* partial = p.workspace + b * team.size * size;
    __builtin_memcpy(p.c + b * in.dim, partial, in.dim * sizeof(T));
    p.lse[b] = partial[in.dim];
    for (int rank = 1; rank < team.size; ++rank) {
      partial += size;
      merge(in.dim, p.lse + b, p.c + b * in.dim, partial[in.dim], partial);
    }
  }
}

// du = sum over threads of their partial gradients at workspace + rank * stride, always in the same order.
template <typename T>
static inline void reduce_du(int64_t dim, const T* partial, int64_t stride, T* du, const Team& team) {
  team.sync();
  const Range columns = team.share(dim, kLanes<T>);
  for_each_vector<T>(columns.size(), [&](int64_t i, int lanes) {
    const int64_t d = columns.begin + i;
    Vec<T> sum{};
    for (int rank = 0; rank < team.size; ++rank) sum += load_part(partial + rank * stride + d, lanes);
    store_part(du + d, sum, lanes);
  });
}

template <typename T>
static void pool_backward_range(const PoolBackwardParams<T>& p, int64_t b, Range range, T* du) {
  const PoolInput<T>& in = p.in;
  const T lse = p.lse[b];
  const T* g = p.grad_c == nullptr ? nullptr : p.grad_c + b * in.dim;
  const T g_lse = p.grad_lse == nullptr ? T(0) : p.grad_lse[b];
  const T g_c = g == nullptr ? T(0) : dot(g, p.c + b * in.dim, in.dim);
  for (int64_t t = range.begin; t < range.end; ++t) {
    T* de = p.de == nullptr ? nullptr : p.de + offset_of(in, b, t);
    T* dscore = p.dscores == nullptr ? nullptr : p.dscores + b * in.steps + t;
    if (!takes_part(in, b, t) || lse == -infinity<T>()) {
      if (de != nullptr) zero(de, in.dim);
      if (dscore != nullptr) *dscore = T(0);
      continue;
    }
    const T* e = in.e + offset_of(in, b, t);
    Vec<T> eu{}, eg{}, eu2{}, eg2{};
    int64_t d = 0;
    for (; d + 2 * kLanes<T> <= in.dim; d += 2 * kLanes<T>) {
      const Vec<T> e0 = load(e + d), e1 = load(e + d + kLanes<T>);
      if (in.u != nullptr) {
        eu += e0 * load(in.u + d);
        eu2 += e1 * load(in.u + d + kLanes<T>);
      }
      if (g != nullptr) {
        eg += e0 * load(g + d);
        eg2 += e1 * load(g + d + kLanes<T>);
      }
    }
    for_each_vector<T>(in.dim - d, [&](int64_t i, int lanes) {
      const Vec<T> e0 = load_part(e + d + i, lanes);
      if (in.u != nullptr) eu += e0 * load_part(in.u + d + i, lanes);
      if (g != nullptr) eg += e0 * load_part(g + d + i, lanes);
    });
    const T score = in.u == nullptr ? in.scores[b * in.steps + t] : sum_lanes<T>(eu + eu2);
    const T alpha = scalar_exp(score - lse);
    const T ds = alpha * (sum_lanes<T>(eg + eg2) - g_c + g_lse);
    if (dscore != nullptr) *dscore = ds;
    for_each_vector<T>(in.dim, [&](int64_t i, int lanes) {
      if (du != nullptr) store_part(du + i, load_part(du + i, lanes) + ds * load_part(e + i, lanes), lanes);
      if (de != nullptr) {
        Vec<T> value = g == nullptr ? Vec<T>{} : alpha * load_part(g + i, lanes);
        if (in.u != nullptr) value += ds * load_part(in.u + i, lanes);
        store_part(de + i, value, lanes);
      }
    });
  }
}

template <typename T>
static void pool_backward(const PoolBackwardParams<T>& p, const Team& team) {
  const PoolInput<T>& in = p.in;
  const int64_t stride = aligned(in.dim + 1);
  T* du = p.du == nullptr ? nullptr : p.workspace + team.rank * stride;
  if (du != nullptr) zero(du, in.dim);
  const bool share_batch = in.batch >= team.size;
  const Range batch = share_batch ? team.share(in.batch) : Range{0, in.batch};
  const Range steps = share_batch ? Range{0, in.steps} : team.share(in.steps, kPoolTile);
  for (int64_t b = batch.begin; b < batch.end; ++b) pool_backward_range(p, b, steps, du);
  if (p.du != nullptr) reduce_du(in.dim, p.workspace, stride, p.du, team);
}

// ---- the causal prefix form: a_t = sigmoid(s_t - l), l <- logaddexp(l, s_t), c <- c + a_t (e_t - c)

// A score that exceeds all before it by more than this could make their share of the state underflow.
constexpr double kSafeRise = 60.0;

// From N scores and the state's l, which is updated: lse, the share of each position (a) and of the state before it (1
// - a).
template <typename T, int N>
static inline void prefix_shares(const T* scores, T* l, T* lse, T* keep, T* share) {
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
      lse[j] = max + scalar_log(sum);
    }
    *l = lse[N - 1];
    return;
  }
  for (int j = 0; j < N; ++j) {
    const T s = scores[j];
    keep[j] = T(1);
    share[j] = T(0);
    if (s != -infinity<T>()) {
      const bool falls = *l > s;
      const T high = falls ? *l : s;
      const T ratio = scalar_exp((falls ? s : *l) - high);  // 0 from an empty state
      const T larger = T(1) / (T(1) + ratio);
      keep[j] = falls ? larger : ratio * larger;
      share[j] = falls ? ratio * larger : larger;
      *l = high + scalar_log1p(ratio);
    }
    lse[j] = *l;
  }
}

// N positions from t on, all of which take part.
template <typename T, int N, bool kStream>
static inline void prefix_tile(const PrefixPoolForwardParams<T>& p, int64_t b, int64_t t, T* l, T* c) {
  const PoolInput<T>& in = p.in;
  const int64_t stride = in.e_step_stride;
  const int64_t dim = in.dim;
  const T* e = in.e + offset_of(in, b, t);
  T* out = p.c + offset_of(in, b, t);
  T scores[N], keep[N], share[N];
  if (in.u == nullptr) {
    for (int j = 0; j < N; ++j) scores[j] = in.scores[b * in.steps + t + j];
  } else {
    const T* u = in.u;
    Vec<T> sums[N] = {};
    for_each_vector<T>(dim, [&](int64_t d, int lanes) {
      const Vec<T> value = load_part(u + d, lanes);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sums[j] += value * load_part(e + j * stride + d, lanes);
    });
    for (int j = 0; j < N; ++j) scores[j] = sum_lanes<T>(sums[j]);
  }
  prefix_shares<T, N>(scores, l, p.lse + b * in.steps + t, keep, share);
  Vec<T> keeps[N], shares[N];
  for (int j = 0; j < N; ++j) {
    keeps[j] = broadcast(keep[j]);
    shares[j] = broadcast(share[j]);
  }
  for_each_vector<T>(dim, [&](int64_t d, int lanes) {
    Vec<T> state = load_part(c + d, lanes);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      // In this order the chain from row to row is one multiply-add.
      state = keeps[j] * state + shares[j] * load_part(e + j * stride + d, lanes);
      if constexpr (kStream) {
        store_streaming(out + j * stride + d, state);
      } else {
        store_part(out + j * stride + d, state, lanes);
      }
    }
    store_part(c + d, state, lanes);
  });
}

// Positions [range) of batch row b, from the state (l, c), which is updated; writes p.c and p.lse.
template <typename T, bool kStream>
static void prefix_range(const PrefixPoolForwardParams<T>& p, int64_t b, Range range, T* l, T* c) {
  const PoolInput<T>& in = p.in;
  for (int64_t t = range.begin; t < range.end;) {
    if (all_take_part(in, b, t, t + kPoolTile, range.end)) {
      prefix_tile<T, kPoolTile, kStream>(p, b, t, l, c);
      t += kPoolTile;
      continue;
    }
    if (takes_part(in, b, t)) {
      prefix_tile<T, 1, kStream>(p, b, t, l, c);
    } else {
      copy(p.c + offset_of(in, b, t), c, in.dim);
      p.lse[b * in.steps + t] = *l;
    }
    ++t;
  }
}

// Whether a result laid out as e should be written past the cache: it would not stay there, and its rows are whole
// lines.
template <typename T>
static inline bool streams(const PoolInput<T>& in, const T* result) {
  return in.batch * in.steps * in.dim * static_cast<int64_t>(sizeof(T)) >= kStreamBytes && in.dim % kLanes<T> == 0 &&
         reinterpret_cast<uintptr_t>(result) % LLM_EXT_VECTOR_BYTES == 0;
}

static inline int64_t chunk_steps(int64_t dim) {
  const int64_t steps = kChunkElements / (dim > 0 ? dim : 1) / kPoolTile * kPoolTile;
  return steps > kPoolTile ? steps : kPoolTile;
}

// Rows of D + 2 elements: a thread's own ones (state of the batch row, gradient of u, zeros, state of its chunk, those
// of a tile), then two sets of one summary a thread.
constexpr int kOwnRows = 4 + kPrefixGradTile;

template <typename T>
static int64_t prefix_pool_workspace(const PoolInput<T>& in, int threads) {
  return threads * (kOwnRows + 2) * aligned(in.dim + 2);
}

template <typename T>
static void prefix_pool_forward(const PrefixPoolForwardParams<T>& p, const Team& team) {
  const PoolInput<T>& in = p.in;
  const int64_t size = aligned(in.dim + 2);
  const bool share_batch = in.batch >= team.size;
  const Range batch = share_batch ? team.share(in.batch) : Range{0, in.batch};
  const auto scan = streams(in, p.c) ? prefix_range<T, true> : prefix_range<T, false>;
  T* c = p.workspace + team.rank * kOwnRows * size;
  T* summaries = p.workspace + team.size * kOwnRows * size;
  int turn = 0;
  for (int64_t b = batch.begin; b < batch.end; ++b) {
    T l = p.l0 == nullptr ? -infinity<T>() : p.l0[b];
    if (p.c0 == nullptr) {
      zero(c, in.dim);
    } else {
      copy(c, p.c0 + b * in.dim, in.dim);
    }
    if (share_batch || team.size == 1) {
      scan(p, b, {0, in.steps}, &l, c);
    } else {
      // Block by block: each thread pools its chunk alone, all learn what came before theirs, then each scans its chunk
      // from there. Summaries alternate between two sets, so that one barrier a block is enough.
      T* before = c + 3 * size;
      for (int64_t start = 0; start < in.steps; start += chunk_steps(in.dim) * team.size) {
        const int64_t left = in.steps - start;
        const int64_t block = left < chunk_steps(in.dim) * team.size ? left : chunk_steps(in.dim) * team.size;
        const Range share = team.share(block, kPoolTile);
        const Range range = {start + share.begin, start + share.end};
        T* set = summaries + turn * team.size * size;
        T* mine = set + team.rank * size;
        mine[in.dim] = pool_range(in, b, range, mine);
        team.sync();
        T l_before = l;
        for (int rank = 0; rank < team.size; ++rank) {
          if (rank == team.rank) {
            l_before = l;
            copy(before, c, in.dim);
          }
          merge(in.dim, &l, c, set[rank * size + in.dim], set + rank * size);
        }
        scan(p, b, range, &l_before, before);
        turn ^= 1;
      }
    }
    if (share_batch || team.rank == 0) {
      p.l_n[b] = l;
      copy(p.c_n + b * in.dim, c, in.dim);
    }
  }
  fence_streaming();
}

// What the positions after a range hand back to it: gradient of the state, and its product with the state.
template <typename T>
struct Carried {
  T* g;  // [D]
  T k;
};

// 1 - a_t: the share of the state before t in the state at t.
template <typename T>
static inline T kept(const PrefixPoolBackwardParams<T>& p, int64_t b, int64_t t) {
  const T* lse = p.lse + b * p.in.steps;
  const T before = t > 0 ? lse[t - 1] : (p.l0 == nullptr ? -infinity<T>() : p.l0[b]);
  // Equal also when both are -inf: the state has seen nothing yet, and goes on as it is.
  return before == lse[t] ? T(1) : scalar_exp(before - lse[t]);
}

// Those of the N positions t, t - 1, ..., into keep, which is padded to whole vectors.
template <typename T, int N>
static inline void kept_tile(const PrefixPoolBackwardParams<T>& p, int64_t b, int64_t t, T* keep) {
  if (N == 1 || t < N) {
    for (int j = 0; j < N; ++j) keep[j] = kept(p, b, t - j);
    return;
  }
  const T* lse = p.lse + b * p.in.steps + t;
  for (int j = 0; j < N; ++j) keep[j] = lse[-j - 1] == lse[-j] ? T(0) : lse[-j - 1] - lse[-j];
  for (int j = 0; j < N; j += kLanes<T>) store(keep + j, vec_exp<T>(load(keep + j)));
}

template <typename T>
static inline const T* grad_row(const PrefixPoolBackwardParams<T>& p, int64_t b, int64_t t, const T* zeros) {
  return p.grad_c == nullptr ? zeros : p.grad_c + offset_of(p.in, b, t);
}

// N positions, the last of them t, all of which take part. `carried` comes in from the positions after them, already
// times their share of the state, and goes out to those before in the same form.
template <typename T, int N, bool kStream>
static inline void prefix_backward_tile(const PrefixPoolBackwardParams<T>& p, int64_t b, int64_t t, Carried<T>* carried,
                                        T* du, const T* zeros, T* states, int64_t size) {
  const PoolInput<T>& in = p.in;
  // Entry j is position t - j. grad_c may be missing: then every row of it is the row of zeros.
  const int64_t stride = in.e_step_stride;
  const int64_t g_stride = p.grad_c == nullptr ? 0 : stride;
  const T* e = in.e + offset_of(in, b, t);
  const T* c = p.c + offset_of(in, b, t);
  const T* g = grad_row(p, b, t, zeros);
  const T* u = in.u == nullptr ? zeros : in.u;
  const T* lse = p.lse + b * in.steps + t;
  T* total = carried->g;
  constexpr int kPadded = N > kLanes<T> ? N : kLanes<T>;
  T keep[kPadded] = {}, alpha[kPadded] = {}, ds[N];
  kept_tile<T, N>(p, b, t, keep);

  Vec<T> ge[N] = {}, gc[N] = {}, eu[N] = {};
  for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
    Vec<T> state = load_part(total + d, lanes);
    const Vec<T> score_vector = load_part(u + d, lanes);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const Vec<T> grad = load_part(g - j * g_stride + d, lanes);
      const Vec<T> value = load_part(e - j * stride + d, lanes);
      state += grad;
      ge[j] += state * value;
      gc[j] += grad * load_part(c - j * stride + d, lanes);
      eu[j] += score_vector * value;
      store_part(states + j * size + d, state, lanes);
      state *= keep[j];
    }
    store_part(total + d, state, lanes);
  });

  for (int j = 0; j < N; ++j) {
    alpha[j] = (in.u == nullptr ? in.scores[b * in.steps + t - j] : sum_lanes<T>(eu[j])) - lse[-j];
  }
  for (int j = 0; j < kPadded; j += kLanes<T>) store(alpha + j, vec_exp<T>(load(alpha + j)));
  for (int j = 0; j < N; ++j) {
    const T k = sum_lanes<T>(gc[j]) + carried->k;
    if (lse[-j] == -infinity<T>()) alpha[j] = T(0);
    ds[j] = alpha[j] == T(0) ? T(0) : alpha[j] * (sum_lanes<T>(ge[j]) - k);
    if (p.dscores != nullptr) p.dscores[b * in.steps + t - j] = ds[j];
    carried->k = keep[j] * k;
  }

  T* de = p.de == nullptr ? nullptr : p.de + offset_of(in, b, t);
  if (du != nullptr) {
    for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
      Vec<T> sum = load_part(du + d, lanes);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum += ds[j] * load_part(e - j * stride + d, lanes);
      store_part(du + d, sum, lanes);
    });
  }
  if (de != nullptr) {
    for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
      const Vec<T> score_vector = load_part(u + d, lanes);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        const Vec<T> value = alpha[j] * load_part(states + j * size + d, lanes) + ds[j] * score_vector;
        if constexpr (kStream) {
          store_streaming(de - j * stride + d, value);
        } else {
          store_part(de - j * stride + d, value, lanes);
        }
      }
    });
  }
}

// A position that takes no part: only what passes through it.
template <typename T>
static inline void prefix_backward_skip(const PrefixPoolBackwardParams<T>& p, int64_t b, int64_t t, Carried<T>* carried,
                                        const T* zeros) {
  const PoolInput<T>& in = p.in;
  const T* g = grad_row(p, b, t, zeros);
  carried->k += dot(g, p.c + offset_of(in, b, t), in.dim);
  for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
    store_part(carried->g + d, load_part(carried->g + d, lanes) + load_part(g + d, lanes), lanes);
  });
  if (p.de != nullptr) zero(p.de + offset_of(in, b, t), in.dim);
  if (p.dscores != nullptr) p.dscores[b * in.steps + t] = T(0);
}

// Positions [range) of batch row b, last first.
template <typename T, bool kStream>
static void prefix_backward_range(const PrefixPoolBackwardParams<T>& p, int64_t b, Range range, Carried<T>* carried,
                                  T* du, const T* zeros, T* states, int64_t size) {
  const PoolInput<T>& in = p.in;
  for (int64_t t = range.end - 1; t >= range.begin;) {
    if (t - kPrefixGradTile + 1 >= range.begin && all_take_part(in, b, t - kPrefixGradTile + 1, t + 1, range.end)) {
      prefix_backward_tile<T, kPrefixGradTile, kStream>(p, b, t, carried, du, zeros, states, size);
      t -= kPrefixGradTile;
      continue;
    }
    if (takes_part(in, b, t)) {
      prefix_backward_tile<T, 1, kStream>(p, b, t, carried, du, zeros, states, size);
    } else {
      prefix_backward_skip(p, b, t, carried, zeros);
    }
    --t;
  }
}

// What [range) alone hands to the positions before it, and (returned) the share of what comes from after it.
template <typename T>
static T prefix_backward_summary(const PrefixPoolBackwardParams<T>& p, int64_t b, Range range, Carried<T>* out,
                                 const T* zeros) {
  const PoolInput<T>& in = p.in;
  zero(out->g, in.dim);
  out->k = T(0);
  T share = T(1);
  for (int64_t t = range.begin; t < range.end; t += kPoolTile) {
    const int count = range.end - t < kPoolTile ? static_cast<int>(range.end - t) : kPoolTile;
    T shares[kPoolTile];
    Vec<T> gc[kPoolTile] = {};
    for (int j = 0; j < count; ++j) shares[j] = share = share * kept(p, b, t + j);
    for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
      Vec<T> sum = load_part(out->g + d, lanes);
      for (int j = 0; j < count; ++j) {
        const Vec<T> grad = load_part(grad_row(p, b, t + j, zeros) + d, lanes);
        sum += shares[j] * grad;
        gc[j] += grad * load_part(p.c + offset_of(in, b, t + j) + d, lanes);
      }
      store_part(out->g + d, sum, lanes);
    });
    for (int j = 0; j < count; ++j) out->k += shares[j] * sum_lanes<T>(gc[j]);
  }
  return share;
}

template <typename T>
static void prefix_pool_backward(const PrefixPoolBackwardParams<T>& p, const Team& team) {
  const PoolInput<T>& in = p.in;
  const int64_t size = aligned(in.dim + 2);
  const bool share_batch = in.batch >= team.size;
  const Range batch = share_batch ? team.share(in.batch) : Range{0, in.batch};
  T* own = p.workspace + team.rank * kOwnRows * size;
  T* du = p.du == nullptr ? nullptr : own + size;
  T* zeros = own + 2 * size;
  T* states = own + 4 * size;
  const auto scan =
      p.de != nullptr && streams(in, p.de) ? prefix_backward_range<T, true> : prefix_backward_range<T, false>;
  T* summaries = p.workspace + team.size * kOwnRows * size;
  if (du != nullptr) zero(du, in.dim);
  zero(zeros, in.dim);
  int turn = 0;
  for (int64_t b = batch.begin; b < batch.end; ++b) {
    // The final state is the one of the last position (or the initial one, if there is none).
    Carried<T> carried = {own, p.grad_l_n == nullptr ? T(0) : -p.grad_l_n[b]};
    const T* c0 = p.c0 == nullptr ? zeros : p.c0 + b * in.dim;
    if (p.grad_c_n == nullptr) {
      zero(own, in.dim);
    } else {
      copy(own, p.grad_c_n + b * in.dim, in.dim);
      carried.k += dot(own, in.steps > 0 ? p.c + offset_of(in, b, in.steps - 1) : c0, in.dim);
    }
    if (share_batch || team.size == 1) {
      scan(p, b, {0, in.steps}, &carried, du, zeros, states, size);
    } else {
      // The forward's chunked scan, from the end.
      for (int64_t end = in.steps; end > 0; end -= chunk_steps(in.dim) * team.size) {
        const int64_t block = end < chunk_steps(in.dim) * team.size ? end : chunk_steps(in.dim) * team.size;
        const Range share = team.share(block, kPoolTile);
        const Range range = {end - block + share.begin, end - block + share.end};
        T* set = summaries + turn * team.size * size;
        Carried<T> mine = {set + team.rank * size, T(0)};
        mine.g[in.dim] = prefix_backward_summary(p, b, range, &mine, zeros);
        mine.g[in.dim + 1] = mine.k;
        team.sync();
        // From the last chunk to mine: what comes in there. On to the first: what goes out of the block.
        const auto pass = [&](int rank) {
          const T* summary = set + rank * size;
          const T through = summary[in.dim];
          for_each_vector<T>(in.dim, [&](int64_t d, int lanes) {
            store_part(own + d, load_part(summary + d, lanes) + through * load_part(own + d, lanes), lanes);
          });
          carried.k = summary[in.dim + 1] + through * carried.k;
        };
        for (int rank = team.size - 1; rank > team.rank; --rank) pass(rank);
        Carried<T> incoming = {own + 3 * size, carried.k};
        copy(incoming.g, own, in.dim);
        for (int rank = team.rank; rank >= 0; --rank) pass(rank);
        scan(p, b, range, &incoming, du, zeros, states, size);
        turn ^= 1;
      }
    }
    if (share_batch || team.rank == 0) {
      if (p.dl0 != nullptr) p.dl0[b] = dot(own, c0, in.dim) - carried.k;
      if (p.dc0 != nullptr) copy(p.dc0 + b * in.dim, own, in.dim);
    }
  }
  fence_streaming();
  if (p.du != nullptr) reduce_du(in.dim, p.workspace + size, kOwnRows * size, p.du, team);
}

}  // namespace LLM_EXT_LEVEL
}  // namespace llm_ext
