#include "plugin/refused_cells.h"

#include <stdexcept>

namespace thimble {

void RefusedCells::clear() {
  for (auto& rows : rows_) rows.clear();
}

void RefusedCells::add(Kind kind, int64_t cell, std::span<const uint8_t> row) {
  rows_[int(kind)][cell].assign(row.begin(), row.end());
}

void RefusedCells::erase(Kind kind, std::span<const int64_t> cells) {
  for (int64_t cell : cells) rows_[int(kind)].erase(cell);
}

void RefusedCells::erase(const WriteTask& task) {
  for (int64_t i = 0; i < task.n_rows; i++) rows_[int(task.kind)].erase(task.cell(i));
}

const std::vector<uint8_t>* RefusedCells::find(Kind kind, int64_t cell) const {
  const auto it = rows_[int(kind)].find(cell);
  return it == rows_[int(kind)].end() ? nullptr : &it->second;
}

void RefusedCells::copy(Kind kind, int64_t from, int64_t to, int64_t n) {
  auto& rows = rows_[int(kind)];
  std::erase_if(rows, [&](const auto& entry) { return entry.first >= to && entry.first < to + n; });
  for (int64_t i = 0; i < n && !rows.empty(); i++) {
    if (const auto it = rows.find(from + i); it != rows.end()) rows[to + i] = it->second;
  }
}

void RefusedCells::check(const BatchSight& sight, int layer, int64_t cells_per_stream) const {
  for (const auto& rows : rows_) {
    for (const auto& [cell, bytes] : rows) {
      for (int64_t row = 0; row < sight.n_tokens * sight.n_streams; row++) {
        if (!sight.sees(row, cell, cells_per_stream)) continue;
        throw std::runtime_error("layer " + std::to_string(layer) +
                                 " cannot be attended to: its cells hold a state of other cache settings, or one that "
                                 "its exact store had no room for");
      }
    }
  }
}

}  // namespace thimble
