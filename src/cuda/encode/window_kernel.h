// Bookkeeping of the window: the kernel's body. A block serves one stream.
#pragma once

#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

struct WindowKernel {
  static constexpr int kThreads = 256;

  /// The stream's cell that token i goes to, or -1.
  SIMT static int cell_of(const WindowArgs& a, int stream, int i) {
    const int64_t cell = a.cells[i] - int64_t(stream) * a.cells_per_stream;
    return cell >= 0 && cell < a.cells_per_stream ? int(cell) : -1;
  }

  /// One warp deals out slots in the tokens' order. Of tokens that go to the ring, only as many get one as it has.
  SIMT static void assign(const WindowArgs& a, int stream) {
    const int lane = simt::thread() % 32, ring = a.capacity - a.n_first, written = a.written[stream];
    int total = 0, before = 0;
    for (int first = 0; first < a.n_tokens; first += 32) {
      const int cell = first + lane < a.n_tokens ? cell_of(a, stream, first + lane) : -1;
      total += simt::popcount(simt::ballot(cell >= a.n_first));
    }
    for (int first = 0; first < a.n_tokens; first += 32) {
      const int i = first + lane, cell = i < a.n_tokens ? cell_of(a, stream, i) : -1;
      const uint32_t lanes = simt::ballot(cell >= a.n_first);
      const int at = before + simt::popcount(lanes & ((1u << lane) - 1));
      before += simt::popcount(lanes);
      if (cell < 0) continue;
      a.slots[i] = cell < a.n_first ? cell : at < total - ring ? -1 : a.n_first + (written + at) % ring;
      a.displaced[i] = -1;
    }
    if (lane == 0) a.written[stream] = (written + total) % ring;
  }

  SIMT static void run(const WindowArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const int stream = simt::block_y();
    int32_t* window = a.window_cells + size_t(stream) * a.capacity;
    uint32_t* hidden = a.hidden + stream * a.hidden_stream_stride;
    if (simt::thread() < 32) assign(a, stream);
    simt::sync();
    // What is displaced, and cells that are written again, by row: each row is one thread's.
    for (int slot = simt::thread(); slot < a.capacity; slot += kThreads) {
      const int old = window[slot];
      bool again = false;
      int token = -1;
      for (int i = 0; i < a.n_tokens; i++) {
        const int cell = cell_of(a, stream, i);
        again = again || (cell >= 0 && cell == old);
        if (cell >= 0 && a.slots[i] == slot) token = i;
      }
      a.tokens[size_t(stream) * a.capacity + slot] = token;
      if (old < 0 || !(again || token >= 0)) continue;
      simt::atomic_and(hidden + old / 32, ~(1u << old % 32));
      window[slot] = -1;
      if (!again) a.displaced[token] = int64_t(stream) * a.cells_per_stream + old;
    }
    simt::sync();
    for (int i = simt::thread(); i < a.n_tokens; i += kThreads) {
      const int cell = cell_of(a, stream, i);
      if (cell < 0 || a.slots[i] < 0) continue;
      window[a.slots[i]] = cell;
      simt::atomic_or(hidden + cell / 32, 1u << cell % 32);
    }
  }
};

}  // namespace thimble::cuda
