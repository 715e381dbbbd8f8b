#include "cache/window.h"

#include <algorithm>
#include <cstddef>

namespace thimble {
namespace {

constexpr uint64_t kGone = 0;  // the number of sequences that are gone, below that of any other
constexpr int64_t kCellsOfASequence = 1024;
constexpr int kSequences = 4;  // at least so many have slots in a stream that may be shared

bool by_cell(const Window::Row& a, const Window::Row& b) {
  return a.cell < b.cell;
}

}  // namespace

Window::Window(WindowSize size, int max_slots, int64_t cells_per_stream, int n_streams)
    : size_(size),
      max_slots_(size.last + size.pool > 0 ? max_slots : 0),
      max_slots_per_stream_(max_slots_ / n_streams),
      cells_per_stream_(cells_per_stream),
      n_used_(n_streams) {}

int Window::slots_of_stream(WindowSize size, int64_t cells_per_stream, int n_streams) {
  if (size.last + size.pool == 0) return 0;
  const int64_t n = n_streams > 1 ? 1 : std::max<int64_t>(kSequences, cells_per_stream / kCellsOfASequence);
  return int(std::min<int64_t>(size.slots() * n, std::max<int64_t>(size.slots(), cells_per_stream)));
}

int Window::find(int64_t cell) const {
  const auto it = slot_of_.find(cell);
  return it == slot_of_.end() ? -1 : it->second;
}

void Window::forget(int64_t cell) {
  const int slot = find(cell);
  if (slot >= 0) empty(slots_[slot]);
}

bool Window::waits(int64_t cell) const {
  const int slot = find(cell);
  return slot >= 0 && slots_[slot].waits_for > 0;
}

void Window::wait(Slot& slot, uint64_t token) {
  n_waiting_ += (token > 0) - (slot.waits_for > 0);
  slot.waits_for = token;
}

void Window::empty(Slot& slot) {
  wait(slot, 0);
  n_used_[stream_of(slot.cell)]--;
  slot_of_.erase(slot.cell);
  slot.cell = -1;
  unused_.push_back(int(&slot - slots_.data()));
  listed_ = false;
}

int Window::free_slot() {
  if (unused_.empty()) {
    slots_.emplace_back();
    return int(slots_.size()) - 1;
  }
  const int slot = unused_.back();
  unused_.pop_back();
  return slot;
}

void Window::fill(int slot, int64_t cell, uint64_t order, uint64_t sequence) {
  slots_[slot] = {cell, order, sequence, 0};
  slot_of_[cell] = slot;
  n_used_[stream_of(cell)]++;
  listed_ = false;
}

void Window::clear() {
  slots_.clear();
  unused_.clear();
  std::fill(n_used_.begin(), n_used_.end(), 0);
  slot_of_.clear();
  batch_.clear();
  rows_.clear();
  stages_.clear();
  listed_ = true;
  commits_ = false;
  arriving_ = 0;
  n_waiting_ = 0;
}

const std::vector<Window::Row>& Window::rows() const {
  if (listed_) return rows_;
  rows_.clear();
  for (int i = 0; i < int(slots_.size()); i++) {
    if (slots_[i].cell >= 0) rows_.push_back({int32_t(slots_[i].cell), false, i});
  }
  for (int i = 0; i < int(batch_.size()); i++) rows_.push_back({int32_t(batch_[i]), true, i});
  std::sort(rows_.begin(), rows_.end(), by_cell);
  listed_ = true;
  return rows_;
}

void Window::begin_batch(std::span<const int64_t> cells) {
  if (commits_) end_commit();  // that of a graph that failed
  arriving_ = 0;
  rows();
  bool all_stay = batch_.empty();
  batch_.assign(cells.begin(), cells.end());
  overwritten_.clear();
  for (int64_t cell : cells) {
    const int slot = find(cell);
    if (slot < 0) continue;
    overwritten_.insert(slots_[slot].sequence);
    empty(slots_[slot]);
    all_stay = false;
  }
  // The rows that stay are in order already. Sorting them again would cost a decoded token more than all else here.
  if (!all_stay) {
    std::erase_if(rows_, [this](const Row& row) { return row.in_flight || slots_[row.index].cell != row.cell; });
  }
  const size_t n_slots = rows_.size();
  for (int i = 0; i < int(batch_.size()); i++) rows_.push_back({int32_t(batch_[i]), true, i});
  std::sort(rows_.begin() + n_slots, rows_.end(), by_cell);
  std::inplace_merge(rows_.begin(), rows_.begin() + n_slots, rows_.end(), by_cell);
  listed_ = true;
}

// Of a sequence's first `end` exact cells, in order of writing, those that leave: the ones that are neither the `last`
// that were written last nor, of the others, the size_.pool that matter most to the batch rows `judges`.
Window::Members Window::leaving(const Members& sequence, int end, int last, std::span<const int> judges,
                                const Judge& judge) const {
  const int n_others = end - last;
  std::vector<std::pair<float, int>> best(n_others);
  for (int i = 0; i < n_others; i++) best[i] = {float(-i), i};
  if (judge && size_.pool > 0 && !judges.empty()) {
    std::vector<Row> rows(end);
    std::vector<float> scores(n_others);
    for (int i = 0; i < end; i++) rows[i] = sequence[i]->row;
    judge(judges, {rows.data(), size_t(n_others)}, {rows.data() + n_others, size_t(last)}, scores);
    for (int i = 0; i < n_others; i++) best[i].first = scores[i];
  }
  const int n_pool = std::min(size_.pool, n_others);
  std::partial_sort(best.begin(), best.begin() + n_pool, best.end(),
                    [](auto a, auto b) { return a.first != b.first ? a.first > b.first : a.second < b.second; });
  Members left;
  for (int i = n_pool; i < n_others; i++) left.push_back(sequence[best[i].second]);
  return left;
}

// Marks which of a sequence's exact cells stay behind the batch: all, if they are no more than `most`; else those that
// would stay if the sequence had only its first `end` ones, and all behind these.
void Window::keep(Members& sequence, int last, int most, int end, const Judge& judge) const {
  Members left;
  if (int(sequence.size()) > most) {
    std::sort(sequence.begin(), sequence.end(), [](auto* a, auto* b) { return a->order < b->order; });
    std::vector<int> judges;
    for (const Candidate* c : sequence) {
      if (c->row.in_flight) judges.push_back(c->row.index);
    }
    left = leaving(sequence, end, last, judges, judge);
  }
  const std::set<const Candidate*> leaves(left.begin(), left.end());
  for (Candidate* c : sequence) c->keep = c->keep || !leaves.count(c);
}

// The same for `n_new` tokens of a sequence, as if each were a batch: cells leave with a token that is one too many.
void Window::come_one_by_one(Members& sequence, int n_new, const Judge& judge) const {
  if (int(sequence.size()) <= size_.total()) {
    for (Candidate* c : sequence) c->keep = true;
    return;
  }
  std::sort(sequence.begin(), sequence.end(), [](auto* a, auto* b) { return a->order < b->order; });
  const auto first = sequence.end() - n_new;
  Members exact(sequence.begin(), first);
  for (auto token = first; token != sequence.end(); ++token) {
    exact.push_back(*token);
    // Cells beyond one too many, which a loaded state may have, do not count yet.
    const int end = size_.total() + 1, row = (*token)->row.index;
    if (int(exact.size()) < end) continue;
    for (Candidate* c : leaving(exact, end, size_.last, {&row, 1}, judge)) {
      std::erase(exact, c);
      c->row.exact_to = row;
      if (token != first) c->waits_for = (*token)->order;
    }
  }
  for (Candidate* c : exact) c->keep = true;
}

// Where the sequences of one batch together keep more cells than there are slots, halves the last cells that each keeps
// until they fit.
void Window::fit(std::vector<Candidate>& candidates, std::vector<Members>& sequences, const Judge& judge) const {
  if (int(candidates.size()) <= max_slots_per_stream_) return;  // they fit, even if all are of one stream
  const auto excess = [&] {
    std::vector<int> n(n_used_.size());
    int most = 0;
    for (const Candidate& c : candidates) {
      if (c.stays()) most = std::max(most, ++n[stream_of(c.row.cell)]);
    }
    return most - max_slots_per_stream_;
  };
  for (int last = size_.last; excess() > 0; last /= 2) {
    for (Candidate& c : candidates) {
      c.keep = false;
      c.waits_for = 0;
      c.row.exact_to = kAllRows;
    }
    for (Members& sequence : sequences) keep(sequence, last, last + size_.pool, int(sequence.size()), judge);
    if (last > 0) continue;
    std::vector<int> n(n_used_.size());
    for (Candidate& c : candidates) c.keep = c.keep && ++n[stream_of(c.row.cell)] <= max_slots_per_stream_;
  }
}

// Empties slots until n more cells of the stream fit; if it has to empty any, then at least size_.spare. Only sequences
// with numbers below `seen_from` lose cells: the last batch did not see them.
void Window::make_room(int64_t stream, int n, uint64_t seen_from) {
  int missing = n_used_[stream] + n - max_slots_per_stream_;
  if (missing <= 0) return;
  missing = std::max(missing, size_.spare);
  std::vector<Slot*> unseen;
  for (Slot& slot : slots_) {
    if (slot.cell >= 0 && slot.sequence < seen_from && stream_of(slot.cell) == stream) unseen.push_back(&slot);
  }
  std::sort(unseen.begin(), unseen.end(), [](const Slot* a, const Slot* b) {
    return a->sequence != b->sequence ? a->sequence < b->sequence : a->order < b->order;
  });
  // In three rounds over the sequences leave: cells of sequences that are gone, other cells outside the pool, the pool.
  for (int round = 0; round < 3; round++) {
    for (auto at = unseen.begin(); at != unseen.end() && missing > 0;) {
      const auto end = std::find_if(at, unseen.end(), [=](const Slot* s) { return s->sequence != (*at)->sequence; });
      const bool gone = (*at)->sequence == kGone;
      auto slot = at + (round == 1 ? std::min<ptrdiff_t>(size_.pool, end - at) : 0);
      for (; slot != end && missing > 0 && (round > 0 || gone); ++slot) {
        if ((*slot)->cell < 0) continue;  // left already
        empty(**slot);
        missing--;
      }
      at = end;
    }
  }
}

int Window::place(int64_t cell, std::vector<Row>& leaving) {
  forget(cell);
  if (max_slots_per_stream_ == 0) return -1;
  if (arriving_ == 0) arriving_ = ++n_sequences_;
  const int64_t stream = stream_of(cell);
  const auto before = slots_;
  std::vector<Candidate> candidates;
  for (int i = 0; i < int(slots_.size()); i++) {
    const Slot& slot = slots_[i];
    if (slot.cell < 0 || slot.sequence != arriving_ || stream_of(slot.cell) != stream) continue;
    candidates.push_back({{int32_t(slot.cell), false, i}, slot.order, slot.sequence});
  }
  candidates.push_back({{int32_t(cell), false, -1}, n_written_ + 1, arriving_});
  Members members;
  for (Candidate& c : candidates) members.push_back(&c);
  keep(members, size_.last, size_.total() + size_.spare, size_.total() + 1, nullptr);
  for (const Candidate& c : candidates) {
    if (!c.keep && c.row.index >= 0) empty(slots_[c.row.index]);
  }
  make_room(stream, 1, arriving_);
  for (int i = 0; i < int(before.size()); i++) {
    if (before[i].cell >= 0 && slots_[i].cell < 0) leaving.push_back({int32_t(before[i].cell), false, i});
  }
  if (!candidates.back().keep || n_used_[stream] >= max_slots_per_stream_) return -1;
  const int slot = free_slot();
  fill(slot, cell, ++n_written_, arriving_);
  return slot;
}

void Window::copy_stream(int from, int to) {
  const int64_t n = cells_per_stream_;
  for (Slot& slot : slots_) {
    if (slot.cell >= 0 && stream_of(slot.cell) == to) empty(slot);
  }
  for (size_t i = 0; i < slots_.size(); i++) {
    const Slot source = slots_[i];
    if (source.cell < 0 || stream_of(source.cell) != from) continue;
    const int slot = free_slot();
    fill(slot, source.cell + (to - from) * n, source.order, source.sequence);
    wait(slots_[slot], source.waits_for);
  }
}

// All exact rows. Those of the batch count as written last, in their order.
std::vector<Window::Candidate> Window::candidates() const {
  std::vector<Candidate> all;
  all.reserve(rows().size());
  for (const Row& row : rows()) {
    const Slot flying{row.cell, n_written_ + 1 + row.index, 0};
    const Slot& slot = row.in_flight ? flying : slots_[row.index];
    all.push_back({row, slot.order, slot.sequence});
  }
  return all;
}

// The exact cells of each sequence in the batch. Gives these sequences new numbers.
std::vector<Window::Members> Window::sequences(std::vector<Candidate>& candidates, const Visible& visible) {
  std::vector<Candidate*> of_batch(batch_.size());
  for (Candidate& c : candidates) {
    if (c.row.in_flight) of_batch[c.row.index] = &c;
  }
  std::vector<Members> all;
  for (int row = int(batch_.size()) - 1; row >= 0; row--) {
    if (of_batch[row]->sequence > 0) continue;  // a later row of the same sequence sees all that this one does
    n_sequences_++;
    Members& sequence = all.emplace_back();
    for (Candidate& c : candidates) {
      if (!visible(row, c.row.cell)) continue;
      c.sequence = n_sequences_;
      sequence.push_back(&c);
    }
  }
  return all;
}

void Window::settle(const Visible& visible) {
  if (n_waiting_ == 0) return;
  std::map<std::pair<int64_t, uint64_t>, int64_t> tokens;  // by stream and order: the cell
  for (const Slot& slot : slots_) {
    if (slot.cell >= 0) tokens[{stream_of(slot.cell), slot.order}] = slot.cell;
  }
  std::vector<Slot*> leaving;
  for (Slot& slot : slots_) {
    if (slot.waits_for == 0) continue;
    const auto token = tokens.find({stream_of(slot.cell), slot.waits_for});
    bool is_seen = false, leaves = false;
    for (int row = 0; row < int(batch_.size()) && !leaves; row++) {
      if (!visible(row, slot.cell)) continue;
      is_seen = true;
      leaves = token != tokens.end() && visible(row, token->second);
    }
    if (leaves) leaving.push_back(&slot);
    if (is_seen && !leaves) wait(slot, 0);
  }
  for (Slot* slot : leaving) empty(*slot);
}

// The stages of the batch, where no sequence has more tokens than are treated as if they had come one by one, and one
// has several.
void Window::find_stages(const std::vector<Candidate>& candidates) {
  stages_.clear();
  std::vector<uint64_t> sequences(batch_.size());
  std::set<int> ends;  // rows that cells leave with
  for (const Candidate& c : candidates) {
    if (c.row.in_flight) sequences[c.row.index] = c.sequence;
    if (!c.keep) ends.insert(c.row.exact_to);
  }
  std::map<uint64_t, int> n_tokens;
  int most = 0;
  for (uint64_t sequence : sequences) most = std::max(most, ++n_tokens[sequence]);
  if (most < 2 || most > size_.one_by_one()) return;
  for (int row = 0; row < int(batch_.size()); row++) {
    if (row == 0 || sequences[row] != sequences[row - 1] || ends.count(row - 1)) stages_.push_back({row, 0});
    stages_.back().n++;
  }
}

Window::Changes Window::begin_commit(const Visible& visible, const Judge& judge) {
  const uint64_t seen_from = n_sequences_ + 1;
  std::vector<Candidate> all = candidates();
  std::vector<Members> seen;
  if (max_slots_ > 0) seen = sequences(all, visible);
  n_written_ += batch_.size();
  for (Members& sequence : seen) {
    int n_new = 0;
    for (const Candidate* c : sequence) n_new += c->row.in_flight;
    if (n_new <= size_.one_by_one()) {
      come_one_by_one(sequence, n_new, judge);
    } else {
      keep(sequence, size_.last, size_.total(), int(sequence.size()), judge);
    }
  }
  fit(all, seen, judge);
  if (batch_.size() > 1 && max_slots_ > 0) find_stages(all);
  rows();
  if (!stages_.empty()) {
    for (size_t i = 0; i < all.size(); i++) {  // candidates are in the order of rows
      if (!all[i].keep) rows_[i].exact_to = all[i].row.exact_to;
    }
  }

  std::map<int64_t, int> arriving;  // by stream
  for (const Candidate& c : all) {
    if (c.row.in_flight) {
      if (c.stays()) arriving[stream_of(c.row.cell)]++;
      continue;
    }
    Slot& slot = slots_[c.row.index];
    const bool is_seen = c.sequence >= seen_from, gone = !is_seen && overwritten_.count(c.sequence);
    // Cells of a sequence that is gone leave when their slots are needed, not at once: the next sequence will write
    // over most of them, and a cell that is written over need not be encoded.
    slot.sequence = gone ? kGone : c.sequence;
    if (!is_seen) continue;
    wait(slot, c.keep ? 0 : c.waits_for);
    if (!c.stays()) empty(slot);
  }
  for (const auto& [stream, n] : arriving) make_room(stream, n, seen_from);
  Changes changes;
  for (const Candidate& c : all) {
    if (!c.row.in_flight || !c.stays()) continue;
    const int slot = free_slot();
    fill(slot, c.row.cell, c.order, c.sequence);
    if (!c.keep) wait(slots_[slot], c.waits_for);
    changes.moves.push_back({c.row.index, slot});
  }
  next_rows_.clear();
  for (size_t i = 0; i < all.size(); i++) {
    const Row& row = rows_[i];
    const int slot = row.in_flight ? find(row.cell) : row.index;
    const bool stays = slot >= 0 && slots_[slot].cell == row.cell;
    if (!stays || (!all[i].keep && all[i].waits_for > 0)) changes.leaving.push_back(row);
    if (stays) next_rows_.push_back({row.cell, false, slot});
  }
  listed_ = true;
  commits_ = true;
  return changes;
}

void Window::end_commit() {
  rows_.swap(next_rows_);
  listed_ = true;
  commits_ = false;
  stages_.clear();
  batch_.clear();
  overwritten_.clear();
}

}  // namespace thimble
