// The order in which a state's exact cells were written. Rows do not say it, and the cells' numbers do not either: a
// sequence's newest cells may have the least ones, and the window keeps a sequence's last cells. States that come back
// to the cache that saved them (a server's prompt cache, its slots) have the order that they had; others have that of
// their cells.
#pragma once

#include <cstdint>
#include <deque>
#include <span>
#include <unordered_map>
#include <vector>

#include "cuda/state/host_window.h"

namespace thimble::cuda {

class SavedOrders {
public:
  /// Keys of a layer, of cells first .. first + n - 1, are saved: `rows` of `row_bytes` each. Ranges of cells that
  /// follow one another are one layer's state, until `end`.
  void save(const HostWindow& window, int64_t first, int64_t n, const uint8_t* rows, size_t row_bytes);
  void end();

  /// When each row of a state was written, in numbers that only compare; of rows that are not exact, 0. Empty where
  /// this state was not saved here, or too many were since.
  std::vector<uint32_t> find(const std::vector<bool>& exact, const uint8_t* rows, size_t row_bytes) const;

  static constexpr size_t kMostStates = 8192;  // of layers

private:
  std::unordered_map<uint64_t, std::vector<uint32_t>> orders_;  // of exact rows, by a hash of all of these
  std::deque<uint64_t> saved_;                                  // the keys, in order
  uint64_t hash_ = 0;                                           // of the state that is being saved
  std::vector<uint32_t> saving_;
};

}  // namespace thimble::cuda
