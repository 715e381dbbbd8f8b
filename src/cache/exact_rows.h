// Where the exact rows of one side of a layer lie: the rows as the model wrote them, f16, not transformed.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cache/window.h"
#include "store/exact_store.h"

namespace thimble {

class ExactRows {
public:
  virtual ~ExactRows() = default;

  /// Makes room for the rows of a batch. Throws std::runtime_error where there is none.
  virtual void begin_batch(std::span<const int64_t> cells) = 0;
  /// A row that the window names, or null where nothing was written to it yet.
  virtual uint16_t* row(const Window::Row& row) const = 0;
  /// The rows of a batch go to their slots, what is left of the batch goes.
  virtual void end_batch(std::span<const Window::Move> moves) = 0;

  /// The row of a cell that is in the window's slot `slot`, or in none (-1). Null where only codes are left of it.
  virtual uint16_t* at(int64_t cell, int slot) = 0;
  /// Room for the row of a cell that is in the window or not, or null. Throws std::runtime_error as begin_batch.
  virtual uint16_t* keep(int64_t cell) = 0;

  /// All rows that lie by cell, from one stream's cells to another's, or the row of one slot to another slot.
  virtual void copy_cells(int64_t from, int64_t to, int64_t n) = 0;
  virtual void copy_slot(int from, int to) = 0;
  virtual void clear() = 0;

  /// The exact store behind the rows, or null.
  virtual const ExactStore* store() const { return nullptr; }
};

/// The window's rows: [n_slots][row_size] in `memory`, slots beyond those in memory of their own, and so is the batch
/// in flight. `memory` must outlive the rows.
std::unique_ptr<ExactRows> window_rows(int row_size, int n_slots, uint16_t* memory);

/// The rows of all cells, in an exact store.
std::unique_ptr<ExactRows> stored_rows(std::unique_ptr<ExactStore> store);

}  // namespace thimble
