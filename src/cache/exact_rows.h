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

  /// Makes room for a row of each of a batch's cells. What an exact store has no room for lies in RAM for as long as
  /// the window needs it.
  virtual void begin_batch(std::span<const int64_t> cells) = 0;
  /// Where the bytes of a row of the window lie; null for a slot that was never written to.
  virtual uint16_t* row(const Window::Row& row) const = 0;
  /// Ends the batch: copies each of its rows that `moves` names to its slot, and drops the others. With an exact store
  /// nothing is copied, as every row was written where it stays.
  virtual void end_batch(std::span<const Window::Move> moves) = 0;

  /// The row of a cell that has the window's slot `slot`, -1 for none. Null where no row of the cell is kept.
  virtual uint16_t* at(int64_t cell, int slot) = 0;
  /// Where a cell's row is to be written that arrives by itself (a loaded state): its place in the exact store; null
  /// without one, where a row needs a slot (Window::place), and where the store is full.
  virtual uint16_t* keep(int64_t cell) = 0;
  /// A row in RAM for a cell of the window that the exact store has no room for.
  virtual uint16_t* lend(int64_t cell) = 0;
  /// Gives back the rows lent to cells of which `in_window` is false.
  virtual void end_loans(const std::function<bool(int64_t cell)>& in_window) = 0;

  /// Copies the rows of cells [from, from + n) to cells [to, to + n), in an exact store; elsewhere rows lie by slot.
  virtual void copy_cells(int64_t from, int64_t to, int64_t n) = 0;
  /// Copies the row of one slot to another slot, where rows lie by slot.
  virtual void copy_slot(int from, int to) = 0;
  virtual void clear() = 0;

  /// The exact store behind the rows, or null.
  virtual const ExactStore* store() const { return nullptr; }
};

/// Only the rows of the window and of the batch in flight: [n_slots][row_size] f16 in `memory`, which must outlive the
/// rows. Slots beyond n_slots and the batch get memory of their own.
std::unique_ptr<ExactRows> window_rows(int row_size, int n_slots, uint16_t* memory);

/// The rows of all cells, in an exact store; a slot is then only a name for its cell. A cell that the store has no room
/// for is exact while the window has it, and then has codes alone.
std::unique_ptr<ExactRows> stored_rows(std::unique_ptr<ExactStore> store, int row_size);

}  // namespace thimble
