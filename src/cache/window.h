// Which cells of a layer are kept exactly: the tokens of the batch in flight, and of every sequence its first `first`
// cells and the last `last` ones, or up to `spare` more.
//
// ggml tells a cache which cells are written and, later, which cells each query may see (the mask); it never names a
// sequence. So sequences are read off the mask: two batch rows belong to the same sequence where the later one sees the
// earlier one's cell, and what the last row of a sequence sees is the sequence. Their order is read off the cells:
// llama.cpp fills a cache in the order of its cells, around, so those closest behind the newest one are the latest. No
// other history decides, so a state need not hold any to go on bit for bit.
//
// Nor does ggml say that a sequence was removed. One is taken for gone, so that its cells are the first to leave where
// room is needed, when another writes into a cell of its window: llama.cpp gives the cells of removed sequences away
// from the first on, which are in the window.
//
// This class only keeps the books (cells, slots); the rows themselves are ExactRows'.
#pragma once

#include <cstdint>
#include <functional>
#include <set>
#include <span>
#include <unordered_map>
#include <vector>

namespace thimble {

struct WindowSize {
  int first = 8;
  int last = 128;
  int spare = 0;  // how many more may stay, so that they leave together: a codebook that is read serves them all
  int total() const { return first + last + spare; }
  bool operator==(const WindowSize&) const = default;
};

class Window {
public:
  /// `max_slots`: how many cells can be kept when no batch is in flight, all sequences together; each stream gets an
  /// equal share of them. Cells are numbered through all streams, `cells_per_stream` to each.
  Window(WindowSize size, int max_slots, int64_t cells_per_stream, int n_streams = 1);

  /// A row that is at hand exactly: of a slot, or of the batch in flight.
  struct Row {
    int32_t cell;
    bool in_flight;
    int32_t index;  // slot, or row of the batch
  };
  /// A row of the batch that goes to a slot.
  struct Move {
    int32_t batch_row;
    int32_t slot;
  };
  /// What the end of a batch does. A slot may be left and moved into.
  struct Changes {
    std::vector<Row> leaving;  // from now on their codes have to do
    std::vector<Move> moves;
  };

  /// A new batch writes these cells; what the window held of them is dropped. Rows of an earlier batch that was never
  /// committed are dropped too.
  void begin_batch(std::span<const int64_t> cells);
  std::span<const int64_t> batch() const { return batch_; }
  /// All exact rows, of slots and of the batch in flight, in order of cells.
  const std::vector<Row>& rows() const { return rows_; }

  /// Ends the batch: `visible(row, cell)` says whether batch row `row` may see `cell`.
  Changes commit(const std::function<bool(int, int64_t)>& visible);

  /// Slot for a cell whose exact row arrives by itself (a loaded state), -1 where the window has no slots at all. Where
  /// all slots are in use the oldest is taken, and `leaving` is the cell that it held; else -1.
  int place(int64_t cell, int64_t* leaving);
  /// Slot of a cell, or -1.
  int find(int64_t cell) const;
  void forget(int64_t cell);
  void clear();

  WindowSize size() const { return size_; }
  int max_slots() const { return max_slots_; }

private:
  struct Slot {
    int64_t cell = -1;
    uint64_t sequence = 0;  // the last that saw it; numbers are given anew in every batch, so they tell the age, too
  };
  struct Candidate {
    Row row;
    uint64_t sequence = 0;
    bool keep = false;
  };
  void keep_ends(std::vector<Candidate*>& sequence, int64_t newest, const std::function<bool(int64_t)>& visible) const;
  void let_go_unseen(int64_t stream, int n, uint64_t seen_from);
  int free_slot(int64_t cell, int64_t* leaving = nullptr);
  void empty(Slot& slot);
  void list_rows();

  WindowSize size_;
  int max_slots_;
  int max_slots_per_stream_;
  int64_t cells_per_stream_;
  uint64_t n_sequences_ = 0;  // numbers given
  std::vector<Slot> slots_;   // grows up to max_slots_
  std::unordered_map<int64_t, int> slot_of_;
  std::vector<int64_t> batch_;
  std::set<uint64_t> overwritten_;  // sequences whose cells the batch took
  std::vector<Row> rows_;
};

}  // namespace thimble
