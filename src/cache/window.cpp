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

void Window::clear() {
  slots_.clear();
  slot_of_.clear();
  batch_.clear();
  rows_.clear();
}

void Window::list_rows() {
  rows_.clear();
  for (int i = 0; i < int(slots_.size()); i++) {
    if (slots_[i].cell >= 0) rows_.push_back({int32_t(slots_[i].cell), false, i});
  }
  for (int i = 0; i < int(batch_.size()); i++) rows_.push_back({int32_t(batch_[i]), true, i});
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
  list_rows();
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
  slot_of_.erase(oldest->cell);
  oldest->cell = -1;
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
  for (Slot* slot : used) {
    slot_of_.erase(slot->cell);
    slot->cell = -1;
  }
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
    int64_t cell;
    uint64_t written;
    int slot;       // -1: in flight
    int batch_row;  // of those in flight
  };
  std::vector<Candidate> candidates;
  for (int i = 0; i < int(slots_.size()); i++) {
    if (slots_[i].cell >= 0) candidates.push_back({slots_[i].cell, slots_[i].written, i, -1});
  }
  for (int i = 0; i < n_batch; i++) candidates.push_back({batch_[i], ++clock_, -1, i});
  std::sort(candidates.begin(), candidates.end(),
            [](const Candidate& a, const Candidate& b) { return a.written > b.written; });  // latest first

  std::vector<char> continued(n_batch, 0), seen(candidates.size(), 0), keep(candidates.size(), 0);
  std::vector<size_t> of_sequence;
  for (int row = n_batch - 1; row >= 0 && max_slots_ > 0; row--) {
    if (continued[row]) continue;  // a later row belongs to the same sequence and sees all that this one does
    of_sequence.clear();
    for (size_t i = 0; i < candidates.size(); i++) {
      if (!visible(row, candidates[i].cell)) continue;
      of_sequence.push_back(i);
      seen[i] = 1;
      if (candidates[i].batch_row >= 0) continued[candidates[i].batch_row] = 1;
    }
    const int last = int(of_sequence.size()) > size_.total() ? size_.last : size_.last + size_.spare;
    for (size_t i = 0; i < of_sequence.size() && int(i) < last; i++) keep[of_sequence[i]] = 1;
    if (size_.first > 0 && int(of_sequence.size()) > last) {
      // The sequence's first cells are those of lowest index that it sees: caches fill from the start.
      const int64_t begin = batch_[row] / cells_per_stream_ * cells_per_stream_;
      int64_t bound = begin;
      for (int count = 0; bound < begin + cells_per_stream_; bound++) {
        if (visible(row, bound) && ++count == size_.first) break;
      }
      for (size_t i : of_sequence) {
        if (candidates[i].cell <= bound) keep[i] = 1;
      }
    }
  }

  Changes changes;
  for (size_t i = 0; i < candidates.size(); i++) {
    if (candidates[i].slot < 0) continue;
    Slot& slot = slots_[candidates[i].slot];
    if (seen[i]) slot.seen = batch_number_;
    if (seen[i] && !keep[i]) {
      slot_of_.erase(slot.cell);
      slot.cell = -1;
    }
  }
  std::map<int64_t, int> arriving;  // by stream
  for (size_t i = 0; i < candidates.size(); i++) {
    if (candidates[i].slot < 0 && keep[i]) arriving[candidates[i].cell / cells_per_stream_]++;
  }
  for (const auto& [stream, n] : arriving) let_go_unseen(stream, n);
  for (size_t i = candidates.size(); i-- > 0;) {  // oldest first
    if (candidates[i].slot >= 0 || !keep[i]) continue;
    const int slot = free_slot(candidates[i].cell);
    if (slot < 0) break;
    slots_[slot] = {candidates[i].cell, candidates[i].written, batch_number_};
    slot_of_[candidates[i].cell] = slot;
    changes.moves.push_back({candidates[i].batch_row, slot});
  }
  // Where free_slot recycled a slot that this very batch had just filled, only the last move into it counts.
  std::erase_if(changes.moves, [this](const Move& m) { return slots_[m.slot].cell != batch_[m.batch_row]; });
  for (const Candidate& c : candidates) {
    if (find(c.cell) >= 0) continue;
    const bool in_flight = c.slot < 0;
    changes.leaving.push_back({int32_t(c.cell), in_flight, in_flight ? c.batch_row : c.slot});
  }
  batch_.clear();
  list_rows();
  return changes;
}

}  // namespace thimble
