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
// A batch may have several tokens of a sequence, up to WindowSize::one_by_one(), that are decoded at once (speculative
// decoding). They are treated as if they had come one by one: cells leave with the token that was one too many, chosen
// by that token's queries, and the tokens behind it attend to those cells from their codes (Row::exact_to, stages).
// Such a token may be a draft that llama.cpp takes back, and then its cells must not have left. So what leaves with any
// but a sequence's first token of a batch keeps its slot, beside its codes, and waits: the mask of the sequence's next
// batch shows which tokens stayed (settle). More tokens at once are a prompt: cells leave behind the batch, by the
// queries of all its tokens.
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

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
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
  int drafts = 0;  // tokens of a sequence that are decoded at once, where they may be more than `spare`
  int total() const { return last + pool + spare; }
  /// So many tokens of a sequence in a batch are treated as if they had come one by one.
  int one_by_one() const { return std::max({spare, drafts, 1}); }
  /// Slots that a sequence may need: behind a batch of several tokens, so many cells may wait for settle.
  int slots() const { return total() + std::max(spare, drafts); }
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

  static constexpr int32_t kAllRows = std::numeric_limits<int32_t>::max();
  /// An exact row: one in a slot, or one of the batch in flight.
  struct Row {
    int32_t cell;
    bool in_flight;
    int32_t index;                // slot, or row of the batch
    int32_t exact_to = kAllRows;  // batch rows behind this one attend to the cell from its codes
  };
  /// Adjacent rows of a batch, of one sequence, that attend to the same cells exactly.
  struct Stage {
    int32_t first, n;
  };
  /// A row of the batch that goes to a slot.
  struct Move {
    int32_t batch_row;
    int32_t slot;
  };
  /// What the end of a batch changes. One slot may be both left by a cell and moved into by another.
  struct Changes {
    std::vector<Row> leaving;  // cells to encode from these rows: those that leave, and those that wait to leave
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
  /// To be called before a batch is attended to: cells that wait leave where the token that they were to leave with is
  /// seen by this batch, and else stay. Those of sequences that this batch does not show go on waiting.
  void settle(const Visible& visible);
  /// Ends the batch, in two steps. begin_commit decides what the end of the batch changes; rows() stays as it is until
  /// end_commit, but for exact_to. Without a judge, older cells matter more.
  Changes begin_commit(const Visible& visible, const Judge& judge = nullptr);
  void end_commit();
  Changes commit(const Visible& visible, const Judge& judge = nullptr) {
    Changes changes = begin_commit(visible, judge);
    end_commit();
    return changes;
  }
  /// Between begin_commit and end_commit: the stages of the batch's rows, in order, where several tokens of a sequence
  /// are treated as if they had come one by one. Empty where all rows attend to the same cells exactly: where each
  /// sequence has one token, or some sequence reads a prompt.
  const std::vector<Stage>& stages() const { return stages_; }

  /// Finds a slot for a cell of a loaded state; -1 where there is none. Rows that have to leave for it are appended to
  /// `leaving`.
  int place(int64_t cell, std::vector<Row>& leaving);
  /// Cells that are placed from now on belong to another sequence.
  void end_arrival() { arriving_ = 0; }
  /// Gives slots to the cells of stream `to` whose counterparts in stream `from` have slots, and to no others.
  void copy_stream(int from, int to);
  /// Slot of a cell, or -1.
  int find(int64_t cell) const;
  /// Whether a cell with a slot has codes as well, which are attended to when it has left.
  bool waits(int64_t cell) const;
  void forget(int64_t cell);
  void clear();

  WindowSize size() const { return size_; }
  int max_slots() const { return max_slots_; }

private:
  struct Slot {
    int64_t cell = -1;
    uint64_t order = 0;      // of writing
    uint64_t sequence = 0;   // that saw it last. Each batch gives its sequences new, greater numbers: less is older
    uint64_t waits_for = 0;  // order of the token that the cell leaves with if that token stays, or 0
  };
  struct Candidate {
    Row row;
    uint64_t order = 0;
    uint64_t sequence = 0;
    bool keep = false;
    uint64_t waits_for = 0;
    bool stays() const { return keep || waits_for > 0; }
  };
  using Members = std::vector<Candidate*>;
  int64_t stream_of(int64_t cell) const { return cell / cells_per_stream_; }
  std::vector<Candidate> candidates() const;
  std::vector<Members> sequences(std::vector<Candidate>& candidates, const Visible& visible);
  Members leaving(const Members& sequence, int end, int last, std::span<const int> judges, const Judge& judge) const;
  void keep(Members& sequence, int last, int most, int end, const Judge& judge) const;
  void come_one_by_one(Members& sequence, int n_new, const Judge& judge) const;
  void fit(std::vector<Candidate>& candidates, std::vector<Members>& sequences, const Judge& judge) const;
  void make_room(int64_t stream, int n, uint64_t seen_from);
  int free_slot();
  void fill(int slot, int64_t cell, uint64_t order, uint64_t sequence);
  void empty(Slot& slot);
  void wait(Slot& slot, uint64_t token);
  void find_stages(const std::vector<Candidate>& candidates);

  WindowSize size_;
  int max_slots_;
  int max_slots_per_stream_;
  int64_t cells_per_stream_;
  uint64_t n_sequences_ = 0;  // the greatest number that a sequence was given
  uint64_t n_written_ = 0;
  uint64_t arriving_ = 0;    // number of the sequence that cells are placed for, or 0
  int n_waiting_ = 0;        // slots with waits_for
  std::vector<Slot> slots_;  // grows up to max_slots_
  std::vector<int> unused_;  // indices of empty slots
  std::vector<int> n_used_;  // by stream
  std::unordered_map<int64_t, int> slot_of_;
  std::vector<int64_t> batch_;
  std::set<uint64_t> overwritten_;  // sequences whose cells the batch took
  std::vector<Stage> stages_;
  std::vector<Row> next_rows_;  // of end_commit
  bool commits_ = false;        // between begin_commit and end_commit
  mutable std::vector<Row> rows_;
  mutable bool listed_ = true;  // rows_ is up to date with slots_ and batch_
};

}  // namespace thimble
