#include "cuda/state/window_books.h"

#include <algorithm>

namespace thimble::cuda {

void WindowBooks::list_hidden(size_t stride) {
  hidden.assign(stride * n_streams, 0);
  for (int stream = 0; stream < n_streams; stream++) {
    for (int slot = 0; slot < capacity; slot++) {
      const int32_t cell = cells[size_t(stream) * capacity + slot];
      if (cell >= 0) hidden[stream * stride + cell / 32] |= 1u << cell % 32;
    }
  }
}

int WindowBooks::slot_of(int64_t cell) const {
  const int stream = int(cell / cells_per_stream), in_stream = int(cell % cells_per_stream);
  if (!(hidden[stream * hidden_stride() + in_stream / 32] >> in_stream % 32 & 1)) return -1;
  const auto first = cells.begin() + ptrdiff_t(stream) * capacity;
  const auto it = std::find(first, first + capacity, in_stream);
  return it == first + capacity ? -1 : int(it - first);
}

std::vector<int32_t> WindowBooks::slots_of(std::span<const int64_t> of) const {
  std::vector<int32_t> slots;
  slots.reserve(of.size());
  for (int64_t cell : of) slots.push_back(slot_of(cell));
  return slots;
}

void WindowBooks::set(int stream, int slot, int32_t cell) {
  int32_t& held = cells[size_t(stream) * capacity + slot];
  uint32_t* bits = &hidden[stream * hidden_stride()];
  if (held >= 0) bits[held / 32] &= ~(1u << held % 32);
  if (cell >= 0) bits[cell / 32] |= 1u << cell % 32;
  held = cell;
}

WindowBooks::Changes WindowBooks::place(std::span<const int64_t> arriving, std::span<const Wish> wishes) {
  Changes changes;
  const auto leave = [&](int stream, int slot) {
    const int32_t held = cells[size_t(stream) * capacity + slot];
    if (held < 0) return;
    changes.leaving.push_back(int64_t(stream) * cells_per_stream + held);
    changes.leaving_slots.push_back(slot);
    set(stream, slot, -1);
  };
  // Of those that wish for a row of the ring, as many as it has get or keep one, the last to arrive. So the next layer,
  // whose cells are the same, changes nothing.
  const int ring = capacity - n_first;
  std::vector<int> in_ring(n_streams);
  for (size_t i = 0; i < arriving.size(); i++) {
    const int stream = int(arriving[i] / cells_per_stream);
    if (const int slot = slot_of(arriving[i]); wishes[i] == Wish::leave && slot >= 0) leave(stream, slot);
    in_ring[stream] += wishes[i] == Wish::enter && arriving[i] % cells_per_stream >= n_first;
  }
  std::vector<size_t> entering;
  std::vector<bool> taken(cells.size());
  for (size_t i = 0; i < arriving.size(); i++) {
    const int stream = int(arriving[i] / cells_per_stream), slot = slot_of(arriving[i]);
    if (wishes[i] != Wish::enter) continue;
    if (arriving[i] % cells_per_stream >= n_first && in_ring[stream]-- > ring) continue;
    if (slot < 0) entering.push_back(i);
    if (slot >= 0) taken[size_t(stream) * capacity + slot] = true;
  }
  for (size_t i : entering) {
    const int stream = int(arriving[i] / cells_per_stream);
    const int32_t cell = int32_t(arriving[i] % cells_per_stream);
    int slot = cell;
    while (cell >= n_first) {
      slot = n_first + written[stream];
      written[stream] = (written[stream] + 1) % ring;
      if (!taken[size_t(stream) * capacity + slot]) break;
    }
    taken[size_t(stream) * capacity + slot] = true;
    leave(stream, slot);
    set(stream, slot, cell);
    changes.entering.push_back(arriving[i]);
    changes.entering_slots.push_back(slot);
  }
  return changes;
}

}  // namespace thimble::cuda
