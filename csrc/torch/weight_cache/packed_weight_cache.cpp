#include "torch/weight_cache/packed_weight_cache.h"

#include <algorithm>
#include <vector>

#include "caches.h"

namespace llm_ext {
namespace {

// Beyond these the entries that were used longest ago are forgotten.
constexpr int64_t kMostBytes = 256 << 20;
constexpr size_t kMostEntries = 64;

}  // namespace

Hash128 hash_of(std::initializer_list<Bytes> pieces, std::initializer_list<int64_t> numbers, int threads) {
  const auto count = [](int64_t bytes) { return (bytes + kHashChunkBytes - 1) / kHashChunkBytes; };
  std::vector<Hash128> digests;
  for (int64_t number : numbers) digests.push_back({static_cast<uint64_t>(number), 0});
  size_t next = digests.size();
  int64_t all = 0;
  for (const Bytes& piece : pieces) all += count(piece.size);
  digests.resize(next + all);
  run_team(threads, [&](const ThreadTeam& team) {
    Hash128* place = digests.data() + next;
    for (const Bytes& piece : pieces) {
      kernels().hash(piece.data, piece.size, place, team);
      place += count(piece.size);
    }
  });
  // The hash of the digests, until it is one.
  do {
    const int64_t bytes = static_cast<int64_t>(digests.size() * sizeof(Hash128));
    std::vector<Hash128> fewer(count(bytes));
    kernels().hash(digests.data(), bytes, fewer.data(), ThreadTeam{0, 1, nullptr});
    digests.swap(fewer);
  } while (digests.size() > 1);
  return digests.front();
}

OptionalTensor PackedWeightsStore::find(const Hash128& hash) {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock) return std::nullopt;
  const auto found =
      std::find_if(entries_.begin(), entries_.end(), [&](const Entry& entry) { return entry.hash == hash; });
  if (found == entries_.end()) return std::nullopt;
  entries_.splice(entries_.begin(), entries_, found);
  return entries_.front().packed;
}

bool PackedWeightsStore::expects(const Hash128& hash, int64_t bytes) {
  if (bytes > kMostBytes) return false;
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock) return false;
  const auto seen = std::find(seen_.begin(), seen_.end(), hash);
  if (seen != seen_.end()) {
    seen_.erase(seen);
    return true;
  }
  seen_.push_front(hash);
  if (seen_.size() > kMostEntries) seen_.pop_back();
  return false;
}

void PackedWeightsStore::remember(const Hash128& hash, const Tensor& packed, int64_t bytes) {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock) return;
  entries_.push_front({hash, packed, bytes});
  bytes_ += bytes;
  while (bytes_ > kMostBytes || entries_.size() > kMostEntries) {
    bytes_ -= entries_.back().bytes;
    entries_.pop_back();
  }
}

void PackedWeightsStore::clear() {
  const std::scoped_lock lock(mutex_);
  entries_.clear();
  seen_.clear();
  bytes_ = 0;
}

int64_t PackedWeightsStore::bytes() {
  const std::scoped_lock lock(mutex_);
  return bytes_;
}

PackedWeightsStore& packed_weights() {
  static PackedWeightsStore& store = *new PackedWeightsStore;  // never destroyed: torch may be gone before
  return store;
}

int64_t packed_weight_cache_bytes() { return packed_weights().bytes(); }
void clear_packed_weight_cache() { packed_weights().clear(); }

}  // namespace llm_ext
