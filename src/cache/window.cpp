#include "cache/window.h"

#include <algorithm>
#include <cstddef>
#include <map>

namespace thimble {

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
  batch_number_++;
  for (int64_t cell : cells) {
    const auto it = slot_of_.find(cell);
    if (it == slot_of_.end()) continue;
    slots_[it->second].cell = -1;
    slot_of_.erase(it);
  }
  // What stays is in order already: sorting all of it would be the most of what a decoded token costs here.
  std::erase_if(rows_, [this](const Row& row) { return row.in_flight || slots_[row.index].cell != row.cell; });
  const auto by_cell = [](const Row& a, const Row& b) { return a.cell < b.cell; };
  const size_t n_slots = rows_.size();
  for (int i = 0; i < int(batch_.size()); i++) rows_.push_back({int32_t(batch_[i]), true, i});
  std::sort(rows_.begin() + n_slots, rows_.end(), by_cell);
  std::inplace_merge(rows_.begin(), rows_.begin() + n_slots, rows_.end(), by_cell);
}

// A slot for one more cell: an unused one, a new one, or that of the cell which no batch has seen for longest (its
// sequence is idle or gone), the oldest written among equals. A stream that has its share recycles its own: what is
// left there of a removed sequence may have been seen later than what an idle stream still needs.
int Window::free_slot(int64_t cell, int64_t* leaving) {
  const auto in_stream = [&](const Slot& slot) { return slot.cell / cells_per_stream_ == cell / cells_per_stream_; };
  int unused = -1, n_in_stream = 0;
  for (int i = 0; i < int(slots_.size()); i++) {
    if (slots_[i].cell < 0) {
      if (unused < 0) unused = i;
    } else if (in_stream(slots_[i])) {
      n_in_stream++;
    }
  }
  if (n_in_stream < max_slots_per_stream_) {
    if (unused >= 0) return unused;
    slots_.emplace_back();
    return int(slots_.size()) - 1;
  }
  Slot* oldest = nullptr;
  for (Slot& slot : slots_) {
    if (slot.cell < 0 || !in_stream(slot)) continue;
    if (!oldest || (slot.seen != oldest->seen ? slot.seen < oldest->seen : slot.written < oldest->written)) {
      oldest = &slot;
    }
  }
  if (!oldest) return -1;
  if (leaving) *leaving = oldest->cell;
  empty(*oldest);
  return int(oldest - slots_.data());
}

// Makes room for n more cells of a stream, or for size_.spare more if it has to make some, out of what this batch did
// not see: that which no batch has seen for longest goes first.
void Window::let_go_unseen(int64_t stream, int n) {
  std::vector<Slot*> used;
  for (Slot& slot : slots_) {
    if (slot.cell >= 0 && slot.cell / cells_per_stream_ == stream) used.push_back(&slot);
  }
  const int missing = int(used.size()) + n - max_slots_per_stream_;
  if (missing <= 0) return;
  std::erase_if(used, [this](const Slot* slot) { return slot->seen == batch_number_; });
  std::sort(used.begin(), used.end(), [](const Slot* a, const Slot* b) {
    return a->seen != b->seen ? a->seen < b->seen : a->written < b->written;
  });
  used.resize(std::min<size_t>(used.size(), std::max(missing, size_.spare)));
  for (Slot* slot : used) empty(*slot);
}

int Window::place(int64_t cell, int64_t* leaving) {
  *leaving = -1;
  forget(cell);
  const int slot = free_slot(cell, leaving);
  if (slot < 0) return -1;
  slots_[slot] = {cell, ++clock_, batch_number_};
  slot_of_[cell] = slot;
  list_rows();
  return slot;
}

Window::Changes Window::commit(const std::function<bool(int, int64_t)>& visible) {
  const int n_batch = int(batch_.size());
  struct Candidate {
    Row row;
    uint64_t written;
    bool seen = false, keep = false;
  };
  std::vector<Candidate> candidates;
  candidates.reserve(rows_.size());
  for (const Row& row : rows_) {
    candidates.push_back({row, row.in_flight ? clock_ + uint64_t(row.index) + 1 : slots_[row.index].written});
  }
  clock_ += uint64_t(n_batch);

  std::vector<char> continued(n_batch, 0);
  std::vector<Candidate*> of_sequence;
  for (int row = n_batch - 1; row >= 0 && max_slots_ > 0; row--) {
    if (continued[row]) continue;  // a later row belongs to the same sequence and sees all that this one does
    of_sequence.clear();
    for (Candidate& c : candidates) {
      if (!visible(row, c.row.cell)) continue;
      of_sequence.push_back(&c);
      c.seen = true;
      if (c.row.in_flight) continued[c.row.index] = 1;
    }
    const bool all = int(of_sequence.size()) <= size_.total();
    if (!all) {
      const auto latest = [](const Candidate* a, const Candidate* b) { return a->written > b->written; };
      std::nth_element(of_sequence.begin(), of_sequence.begin() + size_.last, of_sequence.end(), latest);
    }
    for (size_t i = 0; i < of_sequence.size() && (all || int(i) < size_.last); i++) of_sequence[i]->keep = true;
    if (size_.first > 0 && !all) {
      // The sequence's first cells are those of lowest index that it sees: caches fill from the start.
      const int64_t begin = batch_[row] / cells_per_stream_ * cells_per_stream_;
      int64_t bound = begin;
      for (int count = 0; bound < begin + cells_per_stream_; bound++) {
        if (visible(row, bound) && ++count == size_.first) break;
      }
      for (Candidate* c : of_sequence) {
        if (c->row.cell <= bound) c->keep = true;
      }
    }
  }

  std::vector<Candidate*> arriving;
  std::map<int64_t, int> arriving_in;  // by stream
  for (Candidate& c : candidates) {
    if (!c.row.in_flight) {
      Slot& slot = slots_[c.row.index];
      if (c.seen) slot.seen = batch_number_;
      if (c.seen && !c.keep) empty(slot);
    } else if (c.keep) {
      arriving.push_back(&c);
      arriving_in[c.row.cell / cells_per_stream_]++;
    }
  }
  for (const auto& [stream, n] : arriving_in) let_go_unseen(stream, n);
  Changes changes;
  std::sort(arriving.begin(), arriving.end(), [](const auto* a, const auto* b) { return a->written < b->written; });
  for (const Candidate* c : arriving) {
    const int slot = free_slot(c->row.cell);
    if (slot < 0) break;
    slots_[slot] = {c->row.cell, c->written, batch_number_};
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
  return changes;
}

}  // namespace thimble
