// Additive attention: scores v . tanh(q + k) of all pairs, softmax over the keys, the weighted mean of the values; and
// the backward pass. docs/mathematics derives the formulas.
//
// Nothing of size Tq x Tk x A is stored: the A numbers of a pair stay in registers and are recomputed in the backward
// pass. Scores are stored for a slab of queries, which is small enough to take no more memory than queries and keys.
#include "cuda/attention/gradients.cuh"
#include "cuda/attention/launchers.h"
#include "cuda/attention/one_query.cuh"
#include "cuda/attention/pairs.cuh"
#include "cuda/attention/products.cuh"
#include "cuda/attention/scores.cuh"
#include "cuda/attention/softmax.cuh"
#include "cuda/device.cuh"
#include "cuda/reduce_partial_sums.h"

namespace llm_ext {
namespace cuda {
namespace {

template <typename Params>
int launch_blocks(void (*kernel)(Params), const Params& params, int64_t blocks, size_t shared_bytes, void* stream) {
  if (blocks == 0) return 0;
  LaunchShape shape;
  shape.grid_x = blocks;
  shape.threads = kThreads;
  shape.shared_bytes = shared_bytes;
  return launch(kernel, shape, params, stream);
}

int64_t tiles_of(int64_t count, int64_t tile) { return (count + tile - 1) / tile; }

// The kernels of an op: each call queues one, unless a previous one failed.
template <typename S>
class Attention {
 public:
  using T = Compute<S>;

  Attention(const AdditiveAttentionInput<S>& in, bool* seen, void* stream) : in_(in), stream_(stream) {
    keys_ = {in.key, in.keys, in.key_lengths, in.mask};
    // The mask of one query says which keys any query attends to.
    if (in.mask != nullptr && in.mask_query_stride != 0 && in.queries != 1) {
      keys_.seen = seen;
      queue(additive_seen<S>, SeenParams<S>{in, seen}, tiles_of(in.batch * in.keys, kThreads * kSeenEach), 0);
    }
  }

  void scores(int64_t first, int64_t count, T* to) {
    switch (additive_rows(in_.queries)) {
      case ManyPairs::kQueries:
        return scores_by<ManyPairs>(first, count, to);
      case FewPairs::kQueries:
        return scores_by<FewPairs>(first, count, to);
      default:
        return by_rows(one_query_dots<S, true>, of_keys(to));
    }
  }

  void softmax(void (*kernel)(SoftmaxParams<S>), const SoftmaxParams<S>& params) {
    queue(kernel, params, tiles_of(params.batch * params.count, kWarps), 0);
  }

  template <typename X, typename Y, typename Z>
  void product(ProductParams<X, Y, Z> p) {
    const bool few = p.M <= 16;
    p.row_tiles = tiles_of(p.M, few ? 16 : 64);
    p.column_tiles = tiles_of(p.N, kProductColumns);
    const int64_t numbers = kProductDepth * ((few ? 16 : 64) + 4 + kProductColumns + 4);
    queue(few ? additive_product<X, Y, Z, 1> : additive_product<X, Y, Z, 4>, p,
          in_.batch * p.row_tiles * p.column_tiles, numbers * sizeof(T));
  }

  void gradients(const GradientParams<S>& p) {
    if (additive_rows(p.own.count) == ManyRows::kRows) return gradients_by<ManyRows>(p);
    gradients_by<FewRows>(p);
  }

  // One query: its keys or values, and kernels in which a warp has rows of these, or columns.
  OneQueryParams<S> of_keys(T* numbers) const {
    OneQueryParams<S> p = {};
    p.rows = keys_;
    p.batch = in_.batch;
    p.width = in_.attn_dim;
    p.x = in_.query;
    p.v = in_.v;
    p.numbers = numbers;
    return p;
  }
  OneQueryParams<S> of_values(T* numbers, const S* grad_context) const {
    OneQueryParams<S> p = of_keys(numbers);
    p.rows.data = in_.values;
    p.width = in_.value_dim;
    p.x = grad_context;
    return p;
  }
  void by_rows(void (*kernel)(OneQueryParams<S>), OneQueryParams<S> p) {
    p.tiles = tiles_of(in_.keys, kRowsAtOnce);
    queue(kernel, p, tiles_of(in_.batch * p.tiles, kWarps), 0);
  }
  void by_columns(void (*kernel)(OneQueryParams<S>), OneQueryParams<S> p, int sums) {
    p.tiles = tiles_of(p.width, kWarpThreads * kPackSize<S>);
    queue(kernel, p, in_.batch * p.tiles, sums * kPackSize<S> * kThreads * sizeof(T));
  }

  void add(const PartialSums<S>& sums) {
    if (error_ == 0) error_ = reduce_partial_sums(sums, stream_);
  }

  const Rows<S>& keys() const { return keys_; }
  int error() const { return error_; }

 private:
  template <typename Params>
  void queue(void (*kernel)(Params), const Params& params, int64_t blocks, size_t shared_bytes) {
    if (error_ == 0) error_ = launch_blocks(kernel, params, blocks, shared_bytes, stream_);
  }

  template <typename Tile>
  void scores_by(int64_t first, int64_t count, T* to) {
    const ScoreParams<S> p = {
        in_, keys_, first, count, tiles_of(count, Tile::kQueries), tiles_of(in_.keys, Tile::kKeys), to};
    queue(additive_scores<S, Tile>, p, in_.batch * p.query_tiles * p.key_tiles,
          kScoreNumbers<T, Tile> * sizeof(T) + kWarps * sizeof(int));
  }

  template <typename Tile>
  void gradients_by(GradientParams<S> p) {
    p.attn_dim = in_.attn_dim;
    p.v = in_.v;
    p.first_tile = p.own_first / Tile::kRows;
    p.all_tiles = tiles_of(p.own.count, Tile::kRows);
    p.tiles = tiles_of(p.own_end - p.own_first, Tile::kRows);
    p.chunks = tiles_of(in_.attn_dim, kChunk);
    queue(additive_gradients<S, Tile>, p, in_.batch * p.tiles * p.chunks,
          kGradientNumbers<Tile> * sizeof(T) + kWarps * sizeof(int));
  }

  const AdditiveAttentionInput<S>& in_;
  void* stream_;
  Rows<S> keys_;
  int error_ = 0;
};

// context = weights times values.
template <typename S>
ProductParams<Compute<S>, S, S> context_product(const AdditiveAttentionForwardParams<S>& p, const Rows<S>& keys,
                                                const Compute<S>* weights, int64_t first, int64_t count) {
  const AdditiveAttentionInput<S>& in = p.in;
  ProductParams<Compute<S>, S, S> product = {};
  product.x = {weights, count * in.keys, in.keys, 1};
  product.y = {in.values, in.keys * in.value_dim, in.value_dim, 1};
  product.M = count;
  product.N = in.value_dim;
  product.K = in.keys;
  product.lengths = keys.lengths;
  product.seen = keys.seen;
  product.z = {p.context + first * in.value_dim, nullptr, in.queries * in.value_dim, true, true};
  return product;
}

}  // namespace

template <typename S>
int additive_attention_forward(const AdditiveAttentionForwardParams<S>& p, int64_t slab, void* stream) {
  const AdditiveAttentionInput<S>& in = p.in;
  const AdditiveWorkspace<S> workspace(in, slab, false, p.workspace);
  Attention<S> attention(in, workspace.seen, stream);
  for (int64_t first = 0; first < in.queries; first += slab) {
    const int64_t count = first + slab < in.queries ? slab : in.queries - first;
    attention.scores(first, count, workspace.scores);
    SoftmaxParams<S> softmax = {};
    softmax.batch = in.batch;
    softmax.queries = in.queries;
    softmax.keys = in.keys;
    softmax.first = first;
    softmax.count = count;
    softmax.scores = workspace.scores;
    softmax.weights = p.weights;
    attention.softmax(additive_softmax<S>, softmax);
    if (additive_rows(in.queries) == 1) {
      OneQueryParams<S> context = attention.of_values(workspace.scores, nullptr);
      context.out = p.context;
      attention.by_columns(one_query_context<S>, context, 1);
    } else {
      attention.product(context_product(p, attention.keys(), workspace.scores, first, count));
    }
  }
  return attention.error();
}

template <typename S>
int additive_attention_backward(const AdditiveAttentionBackwardParams<S>& p, int64_t slab, void* stream) {
  using T = Compute<S>;
  const AdditiveAttentionInput<S>& in = p.in;
  const AdditiveWorkspace<S> workspace(in, slab, true, p.workspace);
  Attention<S> attention(in, workspace.seen, stream);
  const Rows<S> queries = {in.query, in.queries, nullptr, nullptr};
  const bool one_query = additive_rows(in.queries) == 1;
  int64_t first = 0;
  // At least once: without queries, the gradients of keys and values are 0.
  do {
    const int64_t count = first + slab < in.queries ? slab : in.queries - first;
    const Matrix<S> grad_context = {p.grad_context == nullptr ? nullptr : p.grad_context + first * in.value_dim,
                                    in.queries * in.value_dim, in.value_dim, 1};
    attention.scores(first, count, workspace.scores);
    if (p.grad_context != nullptr && one_query) {
      attention.by_rows(one_query_dots<S, false>, attention.of_values(workspace.gradients, p.grad_context));
    } else if (p.grad_context != nullptr) {
      ProductParams<S, S, T> product = {};
      product.x = grad_context;
      product.y = {in.values, in.keys * in.value_dim, 1, in.value_dim};
      product.M = count;
      product.N = in.keys;
      product.K = in.value_dim;
      product.z = {workspace.gradients, nullptr, count * in.keys, true, true};
      attention.product(product);
    }
    SoftmaxParams<S> softmax = {};
    softmax.batch = in.batch;
    softmax.queries = in.queries;
    softmax.keys = in.keys;
    softmax.first = first;
    softmax.count = count;
    softmax.scores = workspace.scores;
    softmax.has_gradients = p.grad_context != nullptr;
    softmax.gradients = workspace.gradients;
    softmax.grad_weights = p.grad_weights;
    attention.softmax(additive_softmax_backward<S>, softmax);

    if (one_query) {
      OneQueryParams<S> of_keys = attention.of_keys(workspace.scores);
      of_keys.out = p.dquery;
      of_keys.d_rows = p.dkey;
      of_keys.dv = p.dv == nullptr ? nullptr : workspace.dv;
      if (p.dquery != nullptr || p.dkey != nullptr || p.dv != nullptr) {
        attention.by_columns(one_query_gradients<S>, of_keys, 2);
      }
      OneQueryParams<S> of_values = attention.of_values(workspace.gradients, p.grad_context);
      of_values.d_rows = p.dvalues;
      if (p.dvalues != nullptr) attention.by_rows(one_query_value_gradients<S>, of_values);
      break;
    }
    GradientParams<S> gradients = {};
    gradients.ds = workspace.scores;
    gradients.ds_batch = count * in.keys;
    if (p.dquery != nullptr || p.dv != nullptr) {
      gradients.own = queries;
      gradients.others = attention.keys();
      gradients.own_first = first;
      gradients.own_end = first + count;
      gradients.others_first = 0;
      gradients.others_end = in.keys;
      gradients.ds_own = in.keys;
      gradients.ds_other = 1;
      gradients.out = {p.dquery, nullptr, in.queries * in.attn_dim, true, true};
      gradients.dv = p.dv == nullptr ? nullptr : workspace.dv;
      attention.gradients(gradients);
    }
    if (p.dkey != nullptr) {
      gradients.own = attention.keys();
      gradients.others = queries;
      gradients.own_first = 0;
      gradients.own_end = in.keys;
      gradients.others_first = first;
      gradients.others_end = first + count;
      gradients.ds_own = 1;
      gradients.ds_other = in.keys;
      gradients.out = {p.dkey, workspace.key_sums, in.keys * in.attn_dim, first == 0, first + count == in.queries};
      gradients.dv = nullptr;
      attention.gradients(gradients);
    }
    if (p.dvalues != nullptr) {
      ProductParams<T, S, S> product = {};
      product.x = {workspace.gradients, count * in.keys, 1, in.keys};
      product.y = grad_context;
      product.M = in.keys;
      product.N = in.value_dim;
      product.K = p.grad_context == nullptr ? 0 : count;
      product.z = {p.dvalues, workspace.value_sums, in.keys * in.value_dim, first == 0, first + count == in.queries};
      attention.product(product);
    }
    first += slab;
  } while (first < in.queries);
  if (p.dv != nullptr) {
    const int64_t rows = additive_rows(in.queries), tiles = (in.queries + rows - 1) / rows;
    attention.add(PartialSums<S>{1, in.batch * tiles, in.attn_dim, workspace.dv, nullptr, p.dv, nullptr, nullptr});
  }
  return attention.error();
}

#define FOR(S)                                                                                       \
  template int additive_attention_forward(const AdditiveAttentionForwardParams<S>&, int64_t, void*); \
  template int additive_attention_backward(const AdditiveAttentionBackwardParams<S>&, int64_t, void*);
FOR(float)
FOR(double)
FOR(BFloat16)
FOR(Float16)
#undef FOR

}  // namespace cuda
}  // namespace llm_ext
