#include "torch/weight_cache/packed_weight_cache.h"

#include <algorithm>
#include <vector>

#include "exports.h"
#include "torch/threads/run_team.h"

namespace llm_ext {
namespace {

// Beyond these limits the least recently used entries are evicted.
constexpr int64_t kMaxBytes = 256 << 20;
constexpr size_t kMaxEntries = 64;

}  // namespace

Hash128 hash_of(std::initializer_list<Bytes> ranges, std::initializer_list<int64_t> numbers, int threads) {
  const auto chunks = [](int64_t bytes) { return (bytes + kHashChunkBytes - 1) / kHashChunkBytes; };
  std::vector<Hash128> hashes;
  for (int64_t number : numbers) hashes.push_back({static_cast<uint64_t>(number), 0});
  const size_t first = hashes.size();
  int64_t total = 0;
  for (const Bytes& range : ranges) total += chunks(range.size);
  hashes.resize(first + total);
  run_team(threads, [&](const ThreadTeam& team) {
    Hash128* out = hashes.data() + first;
    for (const Bytes& range : ranges) {
      kernels().hash(range.data, range.size, out, team);
      out += chunks(range.size);
    }
  });
  // Hash the hashes until one is left.
  do {
    const int64_t bytes = static_cast<int64_t>(hashes.size() * sizeof(Hash128));
    std::vector<Hash128> fewer(chunks(bytes));
    kernels().hash(hashes.data(), bytes, fewer.data(), ThreadTeam{0, 1, nullptr});
    hashes.swap(fewer);
  } while (hashes.size() > 1);
  return hashes.front();
}

OptionalTensor PackedWeightCache::find(const Hash128& hash) {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock) return std::nullopt;
  const auto found =
      std::find_if(entries_.begin(), entries_.end(), [&](const Entry& entry) { return entry.hash == hash; });
  if (found == entries_.end()) return std::nullopt;
  entries_.splice(entries_.begin(), entries_, found);
  return entries_.front().packed;
}

bool PackedWeightCache::record_miss(const Hash128& hash, int64_t bytes) {
  if (bytes > kMaxBytes) return false;
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock) return false;
  const auto missed = std::find(missed_.begin(), missed_.end(), hash);
  if (missed != missed_.end()) {
    missed_.erase(missed);
    return true;
  }
  missed_.push_front(hash);
  if (missed_.size() > kMaxEntries) missed_.pop_back();
  return false;
}

void PackedWeightCache::insert(const Hash128& hash, const Tensor& packed, int64_t bytes) {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock) return;
  entries_.push_front({hash, packed, bytes});
  bytes_ += bytes;
  while (bytes_ > kMaxBytes || entries_.size() > kMaxEntries) {
    bytes_ -= entries_.back().bytes;
    entries_.pop_back();
  }
}

void PackedWeightCache::clear() {
  const std::scoped_lock lock(mutex_);
  entries_.clear();
  missed_.clear();
  bytes_ = 0;
}

int64_t PackedWeightCache::bytes() {
  const std::scoped_lock lock(mutex_);
  return bytes_;
}

PackedWeightCache& packed_weight_cache() {
  static PackedWeightCache& cache = *new PackedWeightCache;  // never destroyed: torch may be unloaded before
  return cache;
}

int64_t packed_weight_cache_bytes() { return packed_weight_cache().bytes(); }
void clear_packed_weight_cache() { packed_weight_cache().clear(); }

}  // namespace llm_ext
