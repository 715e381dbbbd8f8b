#include "cuda/state/host_window.h"

#include <algorithm>
#include <tuple>

namespace thimble::cuda {

void HostWindow::list_hidden(size_t stride) {
  hidden.assign(stride * n_streams, 0);
  for (int stream = 0; stream < n_streams; stream++) {
    for (int slot = 0; slot < capacity; slot++) {
      const int32_t cell = cells[size_t(stream) * capacity + slot];
      if (cell >= 0) hidden[stream * stride + cell / 32] |= 1u << cell % 32;
    }
  }
}

int HostWindow::slot_of(int64_t cell) const {
  const int stream = int(cell / cells_per_stream), in_stream = int(cell % cells_per_stream);
  if (!(hidden[stream * hidden_stride() + in_stream / 32] >> in_stream % 32 & 1)) return -1;
  const auto first = cells.begin() + ptrdiff_t(stream) * capacity;
  const auto it = std::find(first, first + capacity, in_stream);
  return it == first + capacity ? -1 : int(it - first);
}

std::vector<int32_t> HostWindow::slots_of(std::span<const int64_t> of) const {
  std::vector<int32_t> slots;
  slots.reserve(of.size());
  for (int64_t cell : of) slots.push_back(slot_of(cell));
  return slots;
}

void HostWindow::set(int stream, int slot, int32_t cell) {
  int32_t& held = cells[size_t(stream) * capacity + slot];
  uint32_t* bits = &hidden[stream * hidden_stride()];
  if (held >= 0) bits[held / 32] &= ~(1u << held % 32);
  if (cell >= 0) bits[cell / 32] |= 1u << cell % 32;
  held = cell;
}

void HostWindow::leave(int stream, int slot, Leaving& leaving) {
  const int32_t held = cells[size_t(stream) * capacity + slot];
  leaving.cells.push_back(int64_t(stream) * cells_per_stream + held);
  leaving.slots.push_back(slot);
  set(stream, slot, -1);
}

// As WindowKernel::make_room: what is gone goes first, then by sequences what is behind the pool, then the pool.
void HostWindow::make_room(int stream, int n, const std::vector<bool>& stays, Leaving& leaving) {
  const size_t first = size_t(stream) * capacity;
  struct Turn {
    int turn;
    uint32_t sequence, order;
    int slot;
  };
  std::vector<Turn> turns;
  for (int slot = 0; slot < capacity; slot++) {
    if (cells[first + slot] < 0 || stays[first + slot]) continue;
    int in_sequence = 0;
    for (int other = 0; other < capacity; other++) {
      in_sequence += cells[first + other] >= 0 && !stays[first + other] &&
                     sequence[first + other] == sequence[first + slot] && order[first + other] < order[first + slot];
    }
    const int turn = sequence[first + slot] == 0 ? 0 : in_sequence >= pool ? 1 : 2;
    turns.push_back({turn, sequence[first + slot], order[first + slot], slot});
  }
  std::sort(turns.begin(), turns.end(), [](const Turn& a, const Turn& b) {
    return std::tie(a.turn, a.sequence, a.order) < std::tie(b.turn, b.sequence, b.order);
  });
  for (int i = 0; i < std::min(n, int(turns.size())); i++) leave(stream, turns[i].slot, leaving);
}

HostWindow::Leaving HostWindow::place(std::span<const int64_t> arriving, const std::vector<bool>& exact,
                                      std::span<const uint32_t> orders) {
  Leaving leaving;
  std::vector<std::vector<size_t>> members(n_streams);
  for (size_t i = 0; i < arriving.size(); i++) {
    const int stream = int(arriving[i] / cells_per_stream), slot = slot_of(arriving[i]);
    if (exact[i]) members[stream].push_back(i);
    if (!exact[i] && slot >= 0) leave(stream, slot, leaving);
  }
  for (int stream = 0; stream < n_streams; stream++) {
    auto& sequence_cells = members[stream];
    if (!orders.empty()) {
      std::stable_sort(sequence_cells.begin(), sequence_cells.end(),
                       [&](size_t a, size_t b) { return orders[a] < orders[b]; });
    }
    const size_t first = size_t(stream) * capacity, n = sequence_cells.size();
    if (n > size_t(std::min(last + pool + 2 * spare, slots))) {  // its oldest and its last ones stay
      const size_t n_last = std::min(last, slots), n_oldest = std::min(pool, slots - int(n_last));
      sequence_cells.erase(sequence_cells.begin() + n_oldest, sequence_cells.end() - n_last);
    }
    std::vector<bool> stays(cells.size());
    std::vector<size_t> entering;
    for (size_t i : sequence_cells) {
      const int slot = slot_of(arriving[i]);
      if (slot < 0) entering.push_back(i);
      if (slot >= 0) stays[first + slot] = true;
    }
    if (sequence_cells.empty()) continue;
    const auto used = capacity - std::count(cells.begin() + first, cells.begin() + first + capacity, -1);
    make_room(stream, int(used) + int(entering.size()) - slots, stays, leaving);
    const uint32_t number = ++books[stream].n_sequences;
    for (size_t i : sequence_cells) {
      int slot = slot_of(arriving[i]);
      if (slot < 0) {
        slot = int(std::find(cells.begin() + first, cells.begin() + first + capacity, -1) - (cells.begin() + first));
        set(stream, slot, int32_t(arriving[i] % cells_per_stream));
        books[stream].n_rows = std::max(books[stream].n_rows, uint32_t(slot + 1));
      }
      order[first + slot] = ++books[stream].n_written;
      sequence[first + slot] = number;
    }
  }
  return leaving;
}

}  // namespace thimble::cuda
