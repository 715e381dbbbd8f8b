// The books of the window (WindowArgs in types.h) on the host, where the cells of a loaded state are dealt their rows.
// The one place that decides which loaded cells stay exact.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace thimble::cuda {

struct WindowBooks {
  int n_streams = 1, cells_per_stream = 0;
  int capacity = 0, n_first = 0;  // rows of a stream; those that its first cells have
  std::vector<int32_t> written;   // [n_streams]
  std::vector<int32_t> cells;     // [n_streams][capacity]: the cell of a row, within its stream; -1: none
  std::vector<uint32_t> hidden;   // [n_streams][cells_per_stream / 32 rounded up to blocks]: the bits of `cells`

  size_t hidden_stride() const { return hidden.size() / n_streams; }
  /// Works `hidden` out from `cells`.
  void list_hidden(size_t stride);

  /// The row of a cell, or -1.
  int slot_of(int64_t cell) const;
  std::vector<int32_t> slots_of(std::span<const int64_t> of) const;

  enum class Wish : uint8_t {
    enter,  // its exact row came, and belongs into the window
    stay,   // its exact row came, and is kept elsewhere; where it has a row in the window, it keeps that
    leave,  // codes came, or nothing that can be used
  };
  /// Cells whose rows are to be coded, and cells that have rows now and had none. The former come first: a row may be
  /// left and entered.
  struct Changes {
    std::vector<int64_t> leaving, entering;
    std::vector<int32_t> leaving_slots, entering_slots;
    bool any() const { return !leaving.empty() || !entering.empty(); }
  };
  /// Deals out rows to cells that arrive in this order: the ring takes them as if they were written now.
  Changes place(std::span<const int64_t> arriving, std::span<const Wish> wishes);

private:
  void set(int stream, int slot, int32_t cell);
};

}  // namespace thimble::cuda
