// Where the exact rows of one side of a layer lie: the rows as the model wrote them, f16, not transformed.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "cache/window.h"
#include "store/exact_store.h"

namespace thimble {

class ExactRows {
public:
  virtual ~ExactRows() = default;

  /// Makes room for a row of each of a batch's cells. A row that an exact store has no room for lies in RAM for as long
  /// as its cell is in the window.
  virtual void begin_batch(std::span<const int64_t> cells) = 0;
  /// The numbers of a row of the window, [n_kv_heads][head_dim]; null for a slot that was never written to.
  virtual uint16_t* row(const Window::Row& row) const = 0;
  /// Ends the batch: copies each of its rows that `moves` names to its slot, and drops the others. With an exact store
  /// nothing is copied, as every row was written where it stays.
  virtual void end_batch(std::span<const Window::Move> moves) = 0;

  /// The row of a cell that has the window's slot `slot`, -1 for none. Null where no row of the cell is kept.
  virtual uint16_t* at(int64_t cell, int slot) = 0;
  /// Where to write the row of a loaded state's cell in the exact store. Null where the store is full, and without a
  /// store: the row then needs a slot (Window::place).
  virtual uint16_t* keep(int64_t cell) = 0;
  /// Lends a row in RAM to a cell of the window that the exact store has no room for.
  virtual uint16_t* lend(int64_t cell) = 0;
  /// Frees the rows that were lent to cells for which `in_window` is false.
  virtual void end_loans(const std::function<bool(int64_t cell)>& in_window) = 0;

  /// Copies the rows of cells [from, from + n) to cells [to, to + n) in an exact store. Does nothing without a store.
  virtual void copy_cells(int64_t from, int64_t to, int64_t n) = 0;
  /// Copies the row of one slot to another slot. Does nothing with a store, whose rows lie by cell.
  virtual void copy_slot(int from, int to) = 0;
  virtual void clear() = 0;

  /// The exact store behind the rows, or null.
  virtual const ExactStore* store() const { return nullptr; }
};

/// Holds only the rows of the window and of the batch in flight: [n_slots][row_size] f16 in `memory`, which must
/// outlive the object. Slots beyond n_slots and the batch get memory of their own.
std::unique_ptr<ExactRows> window_rows(int row_size, int n_slots, uint16_t* memory);

/// Holds the rows of all cells in an exact store; a slot then has no memory. A cell that the store has no room for is
/// exact while it is in the window, and later has codes alone.
std::unique_ptr<ExactRows> stored_rows(std::unique_ptr<ExactStore> store, int row_size);

}  // namespace thimble
