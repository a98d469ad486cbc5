// Partitions of additive attention.
#include <algorithm>

#include "cuda/attention/launchers.h"

namespace llm_ext {
namespace cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

int additive_rows(int64_t count) {
  if (count == 1) return 1;
  const int64_t by_few = ceil_div(count, 8) * 8, by_many = ceil_div(count, kMaxAdditiveRows) * kMaxAdditiveRows;
  // A large tile loads less per pair.
  return 5 * by_few <= 4 * by_many ? 8 : kMaxAdditiveRows;
}

int64_t additive_slab(int64_t queries, int64_t keys, int64_t attn_dim) {
  const int64_t room = (queries + keys) * std::max<int64_t>(attn_dim, 1);
  if (queries * keys <= room) return queries;
  return std::max<int64_t>(room / keys / kMaxAdditiveRows, 1) * kMaxAdditiveRows;
}

}  // namespace cuda
}  // namespace llm_ext
