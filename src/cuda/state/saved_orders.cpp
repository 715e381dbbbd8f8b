#include "cuda/state/saved_orders.h"

#include <cstring>
#include <utility>

namespace thimble::cuda {
namespace {

constexpr uint64_t kStart = 0xcbf29ce484222325;

uint64_t add(uint64_t hash, const uint8_t* row, size_t bytes) {
  for (size_t i = 0; i + 8 <= bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, row + i, 8);
    hash = (hash ^ word) * 0x100000001b3;
    hash ^= hash >> 29;
  }
  return hash;
}

}  // namespace

void SavedOrders::save(const HostWindow& window, int64_t first, int64_t n, const uint8_t* rows, size_t row_bytes) {
  if (saving_.empty()) hash_ = kStart;
  for (int64_t cell = first; cell < first + n; cell++) {
    const int slot = window.slot_of(cell);
    if (slot < 0) continue;
    const size_t stream = size_t(cell / window.cells_per_stream);
    saving_.push_back(window.order[stream * window.capacity + slot]);
    hash_ = add(hash_, rows + size_t(cell - first) * row_bytes, row_bytes);
  }
}

void SavedOrders::end() {
  if (saving_.empty()) return;
  if (orders_.insert_or_assign(hash_, std::exchange(saving_, {})).second) saved_.push_back(hash_);
  if (saved_.size() <= kMostStates) return;
  orders_.erase(saved_.front());
  saved_.pop_front();
}

std::vector<uint32_t> SavedOrders::find(const std::vector<bool>& exact, const uint8_t* rows, size_t row_bytes) const {
  uint64_t hash = kStart;
  size_t n = 0;
  for (size_t i = 0; i < exact.size(); i++) {
    if (!exact[i]) continue;
    hash = add(hash, rows + i * row_bytes, row_bytes);
    n++;
  }
  const auto it = orders_.find(hash);
  if (it == orders_.end() || it->second.size() != n) return {};
  std::vector<uint32_t> all(exact.size());
  for (size_t i = 0, next = 0; i < exact.size(); i++) {
    if (exact[i]) all[i] = it->second[next++];
  }
  return all;
}

}  // namespace thimble::cuda
