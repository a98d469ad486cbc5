// Additive attention: scores v . tanh(query + key), softmax over the keys, weighted mean of the values. It is bound by
// arithmetic, most of all by reciprocals. docs/math/attention.md derives the formulas.
//
// tanh(q + k) = 1 - 2 r with r = 1 / (1 + e^2q e^2k), so exponentials are taken of Tq + Tk rows, not of Tq * Tk pairs.
// They are stored as panels [A / lanes][row][lanes], so that the rows of a register block are adjacent; panels are
// padded to whole blocks of rows and whole vectors of columns, where v is zero. A tile of queries is multiplied with
// all keys of its batch row. Per pair, the workspace holds the score and its gradient, of one tile at a time.
//
// The team splits the batch if it divides evenly. Else the whole team works on one batch row: scores by keys, the rest
// by columns, so that no sum is split between threads.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/ranges.inl"
#include "cpu/simd/traits.inl"
#include "cpu/simd/vec.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// Queries of a tile: whole vectors on every ISA.
constexpr int kQueryTile = 16;
// Queries or keys of a block.
constexpr int kRowBlock = 4;
// Register blocks: kQueryBlock queries by kRowBlock keys; kWideBlock rows by one vector of columns, or fewer rows by up
// to kColumnSums / rows vectors. There are 32 registers with AVX-512, 16 without.
constexpr int kQueryBlock = LLM_EXT_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kWideBlock = 8;
constexpr int kColumnSums = LLM_EXT_VECTOR_BYTES == 64 ? 16 : 8;

// Splits [0, n) into blocks of `most`, then of most / 2, ..., 1: body(first, Constant<size>).
template <int most, typename Body>
static inline void for_each_block(int64_t n, const Body& body, int64_t first = 0) {
  for (; first + most <= n; first += most) body(first, Constant<most>{});
  if constexpr (most > 1) for_each_block<most / 2>(n, body, first);
}

// The arrays in the workspace. `shared` belongs to the threads that work on the same batch row, `own` to one thread;
// both have size() elements. With null pointers it only computes the size.
template <typename T>
struct AdditiveWorkspace {
  template <typename S>
  AdditiveWorkspace(const AdditiveAttentionInput<S>& in, bool backward, T* shared = nullptr, T* own = nullptr)
      : vectors(divide_up(in.attn_dim, kLanes<T>)),
        rows(divide_up(in.keys, kRowBlock) * kRowBlock),
        width(divide_up(in.value_dim, kLanes<T>) * kLanes<T>) {
    const int64_t attn = vectors * kLanes<T>;
    attended = reinterpret_cast<int32_t*>(take(own, in.keys));
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
  int32_t* attended;     // [Tk] own: the keys that are unmasked for any query of the batch row
  T* v;                  // [A] own
  T* keys;               // panel of e^2k of the attended keys
  T* query;              // panel of e^2q of the tile
  T* key_size;           // [rows] largest magnitude of each attended key
  T* query_size;         // [kQueryTile]
  T* scores;             // [rows, kQueryTile] scores, then weights
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

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
