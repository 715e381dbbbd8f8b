// Which cells of a layer are kept exactly: the tokens of the batch in flight, and of every sequence
//
//   - its `last` cells by order of writing, and
//   - `pool` of its other cells: those that matter most (pool.h) when cells leave,
//   - or up to `spare` more: where a sequence has more exact cells than the three together, those that are neither
//   leave,
//     all at once.
//
// ggml tells a cache which cells are written and, later, which cells each query may see (the mask); it never names a
// sequence. So sequences are read off the mask: two batch rows belong to the same sequence where the later one sees the
// earlier one's cell, and what the last row of a sequence sees is the sequence. Cells' numbers mean nothing: a
// restored, shifted or shared cache puts cells anywhere.
//
// Of several tokens at once some may be drafts that are taken back. So a batch of 2 to `spare` tokens of a sequence
// makes nothing leave. The next batch shows which of them stayed, and before it is attended to cells leave as if these
// had come one by one (settle).
//
// Rows that arrive exactly (a loaded state) count as written then, in that order. What came together is taken for one
// sequence until a batch shows what sequences there are.
//
// A stream has a bounded number of slots. Where it has none left, those sequences that no batch has seen for longest
// give way first: they keep their `pool` oldest exact cells, which are those of the pool, and then nothing. Nor does
// ggml say that a sequence was removed. One is taken for gone, so that its cells are the first to leave, when another
// writes into a cell of its window.
//
// This class only keeps the books (cells, slots); the rows themselves are ExactRows'.
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
  int spare = 16;  // a codebook that is read serves all that leave together
  int total() const { return last + pool + spare; }
  int slots() const {
    return total() + spare;
  }  // that a sequence may need: several tokens' cells wait for the next batch
  bool operator==(const WindowSize&) const = default;
};

class Window {
public:
  /// `max_slots`: how many cells can be kept when no batch is in flight, all sequences together; each stream gets an
  /// equal share of them. Cells are numbered through all streams, `cells_per_stream` to each.
  Window(WindowSize size, int max_slots, int64_t cells_per_stream, int n_streams = 1);

  /// Slots of a stream that make sequences of 1024 cells in a stream that they share as good as in streams of their
  /// own, but never fewer than four sequences' in a stream that may be shared, nor more than the stream has cells.
  static int slots_of_stream(WindowSize size, int64_t cells_per_stream, int n_streams);

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
  const std::vector<Row>& rows() const;

  /// Whether batch row `row` may see `cell`.
  using Visible = std::function<bool(int row, int64_t cell)>;
  /// How much each of `rows` matters to the queries of `batch_rows`, beside `recent` rows, into `scores`; the greater,
  /// the more.
  using Judge = std::function<void(std::span<const int> batch_rows, std::span<const Row> rows,
                                   std::span<const Row> recent, std::span<float> scores)>;
  /// Before the batch is attended to, where settles() says so: what leaves now. `judge` goes by rows of the batch
  /// before.
  std::vector<Row> settle(const Visible& visible, const Judge& judge = nullptr);
  bool settles() const { return settles_; }
  /// Ends the batch. Without a judge, older cells matter more.
  Changes commit(const Visible& visible, const Judge& judge = nullptr);

  /// Slot for a cell whose exact row arrives by itself (a loaded state), or -1 where there is none. What leaves for it
  /// is appended to `leaving`.
  int place(int64_t cell, std::vector<Row>& leaving);
  /// What is placed from now on is of another sequence.
  void end_arrival() { arriving_ = 0; }
  /// All that the window holds of one stream, to the same places of another.
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
    uint64_t sequence = 0;  // the last that saw it; numbers are given anew in every batch, so they tell the age, too
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
  uint64_t n_sequences_ = 0;  // numbers given
  uint64_t n_written_ = 0;
  uint64_t arriving_ = 0;  // the sequence of what is placed, or 0
  uint64_t n_before_ = 0;  // written before the last batch that was committed
  bool settles_ = false;
  std::vector<Slot> slots_;  // grows up to max_slots_
  std::vector<int> unused_;  // slots
  std::vector<int> n_used_;  // by stream
  std::unordered_map<int64_t, int> slot_of_;
  std::vector<int64_t> batch_;
  std::set<uint64_t> overwritten_;  // sequences whose cells the batch took
  mutable std::vector<Row> rows_;
  mutable bool listed_ = true;  // rows_ is what slots_ and batch_ say
};

}  // namespace thimble
