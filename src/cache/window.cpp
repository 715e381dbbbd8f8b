#include "cache/window.h"

#include <algorithm>
#include <cstddef>
#include <map>
#include <tuple>

namespace thimble {
namespace {

constexpr uint64_t kGone = 0;  // older than any sequence

}  // namespace

Window::Window(WindowSize size, int max_slots, int64_t cells_per_stream, int n_streams)
    : size_(size),
      max_slots_(size.total() > 0 ? max_slots : 0),
      max_slots_per_stream_(max_slots_ / n_streams),
      cells_per_stream_(cells_per_stream) {}

int Window::find(int64_t cell) const {
  const auto it = slot_of_.find(cell);
  return it == slot_of_.end() ? -1 : it->second;
}

void Window::forget(int64_t cell) {
  const auto it = slot_of_.find(cell);
  if (it == slot_of_.end()) return;
  slots_[it->second].cell = -1;
  slot_of_.erase(it);
  std::erase_if(rows_, [cell](const Row& row) { return !row.in_flight && row.cell == cell; });
}

void Window::empty(Slot& slot) {
  slot_of_.erase(slot.cell);
  slot.cell = -1;
}

void Window::clear() {
  slots_.clear();
  slot_of_.clear();
  batch_.clear();
  rows_.clear();
}

// In order of cells.
void Window::list_rows() {
  rows_.clear();
  for (int i = 0; i < int(slots_.size()); i++) {
    if (slots_[i].cell >= 0) rows_.push_back({int32_t(slots_[i].cell), false, i});
  }
  for (int i = 0; i < int(batch_.size()); i++) rows_.push_back({int32_t(batch_[i]), true, i});
  std::sort(rows_.begin(), rows_.end(), [](const Row& a, const Row& b) { return a.cell < b.cell; });
}

void Window::begin_batch(std::span<const int64_t> cells) {
  batch_.assign(cells.begin(), cells.end());
  overwritten_.clear();
  for (int64_t cell : cells) {
    const int slot = find(cell);
    if (slot < 0) continue;
    overwritten_.insert(slots_[slot].sequence);
    empty(slots_[slot]);
  }
  // What stays is in order already: sorting all of it would be the most of what a decoded token costs here.
  std::erase_if(rows_, [this](const Row& row) { return row.in_flight || slots_[row.index].cell != row.cell; });
  const auto by_cell = [](const Row& a, const Row& b) { return a.cell < b.cell; };
  const size_t n_slots = rows_.size();
  for (int i = 0; i < int(batch_.size()); i++) rows_.push_back({int32_t(batch_[i]), true, i});
  std::sort(rows_.begin() + n_slots, rows_.end(), by_cell);
  std::inplace_merge(rows_.begin(), rows_.begin() + n_slots, rows_.end(), by_cell);
}

// A slot for one more cell: an unused one, a new one, or one of the sequence which no batch has seen for longest. A
// stream that has its share recycles its own: what is left there of a removed sequence may have been seen later than
// what an idle stream still needs.
int Window::free_slot(int64_t cell, int64_t* leaving) {
  const int64_t first = cell / cells_per_stream_ * cells_per_stream_, end = first + cells_per_stream_;
  Slot *unused = nullptr, *oldest = nullptr;
  int n_in_stream = 0;
  for (Slot& slot : slots_) {
    if (slot.cell < 0) {
      if (!unused) unused = &slot;
    } else if (slot.cell >= first && slot.cell < end) {
      n_in_stream++;
      if (!oldest || std::tie(slot.sequence, slot.cell) < std::tie(oldest->sequence, oldest->cell)) oldest = &slot;
    }
  }
  if (n_in_stream < max_slots_per_stream_) {
    if (!unused) unused = &slots_.emplace_back();
    return int(unused - slots_.data());
  }
  if (!oldest) return -1;
  if (leaving) *leaving = oldest->cell;
  empty(*oldest);
  return int(oldest - slots_.data());
}

// Makes room for n more cells of a stream, or for size_.spare more if it has to make some, out of what this batch did
// not see: that which no batch has seen for longest goes first.
void Window::let_go_unseen(int64_t stream, int n, uint64_t seen_from) {
  const int64_t first = stream * cells_per_stream_, end = first + cells_per_stream_;
  std::vector<Slot*> used;
  for (Slot& slot : slots_) {
    if (slot.cell >= first && slot.cell < end) used.push_back(&slot);
  }
  const int missing = int(used.size()) + n - max_slots_per_stream_;
  if (missing <= 0) return;
  std::erase_if(used, [&](const Slot* slot) { return slot->sequence >= seen_from; });
  std::sort(used.begin(), used.end(), [](const Slot* a, const Slot* b) {
    return std::tie(a->sequence, a->cell) < std::tie(b->sequence, b->cell);
  });
  used.resize(std::min<size_t>(used.size(), std::max(missing, size_.spare)));
  for (Slot* slot : used) empty(*slot);
}

int Window::place(int64_t cell, int64_t* leaving) {
  *leaving = -1;
  forget(cell);
  const int slot = free_slot(cell, leaving);
  if (slot < 0) return -1;
  slots_[slot] = {cell, ++n_sequences_};  // of a sequence by itself until a batch sees it
  slot_of_[cell] = slot;
  list_rows();
  return slot;
}

// Of what a sequence sees, in order of cells, keeps the first cells and the last of the others.
void Window::keep_ends(std::vector<Candidate*>& sequence, int64_t newest,
                       const std::function<bool(int64_t)>& visible) const {
  const ptrdiff_t at_most = size_.last + size_.spare;
  if (ptrdiff_t(sequence.size()) > at_most) {
    // The first cells are those of lowest index that the sequence sees: caches fill from the start.
    int64_t bound = newest / cells_per_stream_ * cells_per_stream_;
    for (int n = 0; n < size_.first && bound <= sequence.back()->row.cell; bound++) n += visible(bound);
    const auto is_before = [](int64_t cell) { return [cell](const Candidate* c) { return c->row.cell < cell; }; };
    const auto others = std::partition_point(sequence.begin(), sequence.end(), is_before(bound));
    if (sequence.end() - others > at_most) {
      // Those behind the newest are the latest, those above it were written the last time around.
      std::rotate(others, std::partition_point(others, sequence.end(), is_before(newest + 1)), sequence.end());
      sequence.erase(others, sequence.end() - size_.last);
    }
  }
  for (Candidate* c : sequence) c->keep = true;
}

Window::Changes Window::commit(const std::function<bool(int, int64_t)>& visible) {
  const int n_batch = int(batch_.size());
  const uint64_t seen_from = n_sequences_ + 1;
  std::vector<Candidate> candidates;
  std::vector<Candidate*> of_batch(n_batch);
  candidates.reserve(rows_.size());
  for (const Row& row : rows_) {
    candidates.push_back({row, row.in_flight ? 0 : slots_[row.index].sequence});
    if (row.in_flight) of_batch[row.index] = &candidates.back();
  }
  std::vector<Candidate*> sequence;
  for (int row = n_batch - 1; row >= 0 && max_slots_ > 0; row--) {
    if (of_batch[row]->sequence > 0) continue;  // a later row of the same sequence sees all that this one does
    n_sequences_++;
    sequence.clear();
    for (Candidate& c : candidates) {
      if (!visible(row, c.row.cell)) continue;
      c.sequence = n_sequences_;
      sequence.push_back(&c);
    }
    keep_ends(sequence, batch_[row], [&](int64_t cell) { return visible(row, cell); });
  }

  std::map<int64_t, int> arriving;  // by stream
  for (const Candidate& c : candidates) {
    if (c.row.in_flight) {
      if (c.keep) arriving[c.row.cell / cells_per_stream_]++;
      continue;
    }
    const bool seen = c.sequence >= seen_from, gone = !seen && overwritten_.count(c.sequence);
    // What is gone leaves when its room is needed, not at once: the next conversation is about to write over most of
    // it, and what is written over need not be coded.
    slots_[c.row.index].sequence = gone ? kGone : c.sequence;
    if (seen && !c.keep) empty(slots_[c.row.index]);
  }
  for (const auto& [stream, n] : arriving) let_go_unseen(stream, n, seen_from);
  Changes changes;
  for (const Candidate* c : of_batch) {
    if (!c->keep) continue;
    const int slot = free_slot(c->row.cell);
    if (slot < 0) break;
    slots_[slot] = {c->row.cell, c->sequence};
    slot_of_[c->row.cell] = slot;
    changes.moves.push_back({c->row.index, slot});
  }
  // Where free_slot recycled a slot that this very batch had just filled, only the last move into it counts.
  std::erase_if(changes.moves, [this](const Move& m) { return slots_[m.slot].cell != batch_[m.batch_row]; });
  std::erase_if(rows_, [&](Row& row) {
    const int slot = row.in_flight ? find(row.cell) : row.index;
    const bool stays = slot >= 0 && slots_[slot].cell == row.cell;
    if (!stays) changes.leaving.push_back(row);
    if (stays) row = {row.cell, false, slot};
    return !stays;
  });
  batch_.clear();
  overwritten_.clear();
  return changes;
}

}  // namespace thimble
