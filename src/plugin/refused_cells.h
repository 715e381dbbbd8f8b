// Cells of a layer whose rows were in a loaded state and were refused by the cache. Their rows are kept and saved again
// as they came, and attention that sees one of the cells fails. The load itself cannot always fail, since llama.cpp
// loads states from memory in a destructor.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "engine/kv_cache.h"

namespace thimble {

class RefusedCells {
public:
  bool empty() const { return rows_[0].empty() && rows_[1].empty(); }
  void clear();
  void add(Kind kind, int64_t cell, std::span<const uint8_t> row);
  /// Drops cells that were written or loaded anew.
  void erase(Kind kind, std::span<const int64_t> cells);
  void erase(const WriteTask& task);
  /// The row of a cell, or null.
  const std::vector<uint8_t>* find(Kind kind, int64_t cell) const;
  /// Copies the refused rows of cells [from, from + n) to cells [to, to + n), and drops what was there.
  void copy(Kind kind, int64_t from, int64_t to, int64_t n);

  /// Throws std::runtime_error where a batch sees one of the cells.
  void check(const BatchSight& sight, int layer, int64_t cells_per_stream) const;

private:
  std::map<int64_t, std::vector<uint8_t>> rows_[2];  // by Kind
};

}  // namespace thimble
