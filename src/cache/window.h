// Which cells of a layer are kept exactly: the tokens of the batch in flight, and of every sequence
//
//   - its `last` cells by order of writing, and
//   - `pool` of its other cells: those that matter most (pool.h) when cells leave,
//   - up to `spare` more. Where a sequence has more exact cells than last + pool + spare, those that are neither last
//     nor in the pool leave together.
//
// ggml tells a cache which cells are written and, later, which cells each query may see (the mask); it never names a
// sequence. So sequences are read off the mask: two batch rows belong to the same sequence where the later one sees the
// earlier one's cell, and the cells that the last row of a sequence sees are the sequence. The numbers of cells say
// nothing: a restored, shifted or shared cache puts tokens into any cells.
//
// Some tokens of a batch of several may be drafts that llama.cpp takes back. So a batch of 2 to `spare` tokens of a
// sequence makes no cell leave. The mask of the next batch shows which tokens stayed; before that batch is attended to,
// those cells leave that would have left if the tokens had come one by one (settle).
//
// Rows of a loaded state count as written in the order in which they arrive. Rows that arrive together count as one
// sequence until a batch shows which sequences there are.
//
// A stream has a bounded number of slots. Where none is left, cells of sequences that the batch does not see leave, the
// sequence that was seen longest ago first: each sequence's cells outside its pool (its `pool` oldest exact cells), and
// where that is not enough the pools too. ggml does not say that a sequence was removed, either: when a batch writes
// into a cell of a sequence's window, that sequence counts as gone, and its other cells leave before all others.
//
// This class only records which cell has which slot; ExactRows holds the rows themselves.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <span>
#include <unordered_map>
#include <vector>

namespace thimble {

struct WindowSize {
  int last = 128;
  int pool = 40;
  int spare = 16;  // so many cells leave and are encoded together, so that a codebook is read once for all of them
  int total() const { return last + pool + spare; }
  /// Slots that a sequence may need: after a batch of several tokens, up to `spare` cells wait for settle to leave.
  int slots() const { return total() + spare; }
  bool operator==(const WindowSize&) const = default;
};

class Window {
public:
  /// `max_slots`: how many cells can be kept when no batch is in flight, all sequences together; each stream gets an
  /// equal share of them. Cells are numbered through all streams, `cells_per_stream` to each.
  Window(WindowSize size, int max_slots, int64_t cells_per_stream, int n_streams = 1);

  /// How many slots a stream gets: size.slots() for every 1024 cells, so that sequences of that length have as many
  /// exact cells in a shared stream as in one of their own. A stream that may be shared (n_streams = 1) gets at least
  /// four times size.slots(), one of several streams just size.slots(); none gets more than max(size.slots(), cells).
  static int slots_of_stream(WindowSize size, int64_t cells_per_stream, int n_streams);

  /// An exact row: one in a slot, or one of the batch in flight.
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
  /// What the end of a batch changes. One slot may be both left by a cell and moved into by another.
  struct Changes {
    std::vector<Row> leaving;  // cells to encode from these rows, which are void afterwards
    std::vector<Move> moves;
  };

  /// Begins a batch that writes these cells; their slots are emptied. Rows of an earlier batch that was never committed
  /// are dropped too.
  void begin_batch(std::span<const int64_t> cells);
  std::span<const int64_t> batch() const { return batch_; }
  /// All exact rows, of slots and of the batch in flight, in order of cells.
  const std::vector<Row>& rows() const;

  /// Whether batch row `row` may see `cell`.
  using Visible = std::function<bool(int row, int64_t cell)>;
  /// Writes to `scores` how much each of `rows` matters to the queries of the batch rows `batch_rows`, compared with
  /// the rows `recent`; a greater score matters more.
  using Judge = std::function<void(std::span<const int> batch_rows, std::span<const Row> rows,
                                   std::span<const Row> recent, std::span<float> scores)>;
  /// To be called before a batch is attended to, where settles() is true: returns the rows that leave because of the
  /// previous batch. `judge` gets rows of that previous batch.
  std::vector<Row> settle(const Visible& visible, const Judge& judge = nullptr);
  bool settles() const { return settles_; }
  /// Ends the batch. Without a judge, older cells matter more.
  Changes commit(const Visible& visible, const Judge& judge = nullptr);

  /// Finds a slot for a cell of a loaded state; -1 where there is none. Rows that have to leave for it are appended to
  /// `leaving`.
  int place(int64_t cell, std::vector<Row>& leaving);
  /// Cells that are placed from now on belong to another sequence.
  void end_arrival() { arriving_ = 0; }
  /// Gives slots to the cells of stream `to` whose counterparts in stream `from` have slots, and to no others.
  void copy_stream(int from, int to);
  /// Slot of a cell, or -1.
  int find(int64_t cell) const;
  void forget(int64_t cell);
  void clear();

  WindowSize size() const { return size_; }
  int max_slots() const { return max_slots_; }

private:
  struct Slot {
    int64_t cell = -1;
    uint64_t order = 0;     // of writing
    uint64_t sequence = 0;  // that saw it last. Each batch gives its sequences new, greater numbers: less is older
  };
  struct Candidate {
    Row row;
    uint64_t order = 0;
    uint64_t sequence = 0;
    bool keep = false;
  };
  using Members = std::vector<Candidate*>;
  int64_t stream_of(int64_t cell) const { return cell / cells_per_stream_; }
  std::vector<Candidate> candidates() const;
  std::vector<Members> sequences(std::vector<Candidate>& candidates, const Visible& visible);
  void keep(Members& sequence, int last, int spare, int most, const Judge& judge) const;
  void fit(std::vector<Candidate>& candidates, std::vector<Members>& sequences, const Judge& judge) const;
  void make_room(int64_t stream, int n, uint64_t seen_from);
  int free_slot();
  void fill(int slot, int64_t cell, uint64_t order, uint64_t sequence);
  void empty(Slot& slot);

  WindowSize size_;
  int max_slots_;
  int max_slots_per_stream_;
  int64_t cells_per_stream_;
  uint64_t n_sequences_ = 0;  // the greatest number that a sequence was given
  uint64_t n_written_ = 0;
  uint64_t arriving_ = 0;  // number of the sequence that cells are placed for, or 0
  uint64_t n_before_ = 0;  // n_written_ before the last committed batch
  bool settles_ = false;
  std::vector<Slot> slots_;  // grows up to max_slots_
  std::vector<int> unused_;  // indices of empty slots
  std::vector<int> n_used_;  // by stream
  std::unordered_map<int64_t, int> slot_of_;
  std::vector<int64_t> batch_;
  std::set<uint64_t> overwritten_;  // sequences whose cells the batch took
  mutable std::vector<Row> rows_;
  mutable bool listed_ = true;  // rows_ is up to date with slots_ and batch_
};

}  // namespace thimble
