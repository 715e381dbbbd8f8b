// The window's kernel under emulation, with the memory that it works on.
#pragma once

#include <algorithm>
#include <vector>

#include "cache/window.h"
#include "cuda/encode/window_kernel.h"
#include "cuda/state/host_window.h"

namespace thimble::cuda {

/// A cache's window on the device and what it needs of a batch.
struct TestWindow {
  TestWindow(WindowSize size, int slots, int cells, int n_streams)
      : slots(slots), n_cells(cells), n_streams(n_streams) {
    a.n_streams = n_streams;
    a.cells_per_stream = a.mask_cells = cells;
    a.last = size.last;
    a.pool = size.pool;
    a.spare = size.spare;
    a.slots = slots;
    a.capacity = slots + kMaxTokens;
    const size_t rows = size_t(n_streams) * a.capacity;
    books.resize(n_streams);
    window.resize(rows, -1);
    tokens = window;
    order.resize(rows);
    sequence.resize(rows);
    leaving_cells.resize(rows);
    leaving_slots.resize(rows);
    hidden.resize(n_streams * cells / 32);
    a.books = books.data();
    a.window_cells = window.data();
    a.tokens = tokens.data();
    a.order = order.data();
    a.sequence = sequence.data();
    a.leaving_cells = leaving_cells.data();
    a.leaving_slots = leaving_slots.data();
    a.n_leaving = n_leaving;
    a.hidden = hidden.data();
    a.hidden_stream_stride = cells / 32;
  }
  TestWindow(const TestWindow&) = delete;  // the arguments point into it
  /// `mask` [tokens][cells of a stream].
  void update(const std::vector<int64_t>& cells, const std::vector<uint16_t>& mask) {
    marks.assign(cells.size(), 99);
    token_slots.assign(cells.size(), 99);
    a.n_tokens = a.mask_tokens = int(cells.size());
    a.cells = cells.data();
    a.mask = mask.data();
    a.mask_token_stride = n_cells;
    a.marks = marks.data();
    a.token_slots = token_slots.data();
    simt::Machine::launch({1, n_streams}, WindowKernel::kThreads, WindowKernel::kSharedBytes,
                          [&] { WindowKernel::run(a); });
  }
  std::vector<int64_t> exact() const {
    std::vector<int64_t> cells;
    for (size_t row = 0; row < window.size(); row++) {
      if (window[row] >= 0) cells.push_back(int64_t(row / a.capacity) * n_cells + window[row]);
    }
    std::sort(cells.begin(), cells.end());
    return cells;
  }

  /// As DeviceWindow::read and DeviceWindow::write do it.
  HostWindow read() const {
    HostWindow host;
    host.n_streams = n_streams;
    host.cells_per_stream = n_cells;
    host.last = a.last;
    host.pool = a.pool;
    host.spare = a.spare;
    host.slots = slots;
    host.capacity = a.capacity;
    host.books = books;
    host.cells = window;
    host.order = order;
    host.sequence = sequence;
    host.list_hidden(a.hidden_stream_stride);
    return host;
  }
  void write(const HostWindow& host) {
    std::copy(host.books.begin(), host.books.end(), books.begin());
    std::copy(host.cells.begin(), host.cells.end(), window.begin());
    std::copy(host.order.begin(), host.order.end(), order.begin());
    std::copy(host.sequence.begin(), host.sequence.end(), sequence.begin());
    std::copy(host.hidden.begin(), host.hidden.end(), hidden.begin());
  }

  int slots, n_cells, n_streams;
  WindowArgs a;
  std::vector<WindowBooks> books;
  std::vector<int32_t> window, tokens, leaving_slots, token_slots;
  std::vector<uint32_t> order, sequence, marks, hidden;
  std::vector<int64_t> leaving_cells;
  int n_leaving[2] = {0, 0};
};

}  // namespace thimble::cuda
