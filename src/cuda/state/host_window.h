// A layer's window (LayerWindow in types.h) on the host, where the cells of a loaded state are dealt their rows: the
// rule of Window::place. The one place that decides which loaded cells stay exact.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cuda/types.h"

namespace thimble::cuda {

struct HostWindow {
  int n_streams = 1, cells_per_stream = 0;
  int last = 0, pool = 0, spare = 0;      // WindowSize
  int slots = 0, capacity = 0;            // rows of a stream, as in WindowArgs
  std::vector<WindowBooks> books;         // [n_streams]
  std::vector<int32_t> cells;             // [n_streams][capacity]: the cell of a row, within its stream; -1: none
  std::vector<uint32_t> order, sequence;  // [n_streams][capacity]
  std::vector<uint32_t> hidden;           // [n_streams][cells_per_stream / 32, of whole blocks]: the bits of `cells`

  size_t hidden_stride() const { return hidden.size() / n_streams; }
  /// Works `hidden` out from `cells`.
  void list_hidden(size_t stride);

  /// The row of a cell, or -1.
  int slot_of(int64_t cell) const;
  std::vector<int32_t> slots_of(std::span<const int64_t> of) const;

  /// Cells whose rows are to be coded. A row may be left and entered.
  struct Leaving {
    std::vector<int64_t> cells;
    std::vector<int32_t> slots;
  };
  /// Deals out rows to cells of a sequence that arrive; `exact` says of each whether its row came, else it leaves. The
  /// sequence's order is that of `orders`, where there are any (SavedOrders), else that of arrival.
  Leaving place(std::span<const int64_t> arriving, const std::vector<bool>& exact,
                std::span<const uint32_t> orders = {});

private:
  void set(int stream, int slot, int32_t cell);
  void leave(int stream, int slot, Leaving& leaving);
  void make_room(int stream, int n, const std::vector<bool>& stays, Leaving& leaving);
};

}  // namespace thimble::cuda
