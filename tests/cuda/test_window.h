// A layer's window and the memory that its kernels work on, under emulation or, in device_check.cu, on a device.
#pragma once

#include <algorithm>
#include <vector>

#include "cache/window.h"
#include "cuda/host/tables.h"
#include "cuda/state/host_window.h"
#include "cuda/types.h"
#ifdef THIMBLE_SIMT_HOST
#include "cuda/encode/judge.h"
#include "cuda/encode/prompt_kernel.h"
#include "cuda/encode/window_kernel.h"
#endif

namespace thimble::cuda {

/// A layer's window and what it needs of a batch. `Device` runs kernels on the memory of its Vectors.
template <typename Device>
struct WindowOn {
  template <typename T>
  using Vector = typename Device::template Vector<T>;

  WindowOn(WindowSize size, int slots, int cells, int n_streams) : slots(slots), n_cells(cells), n_streams(n_streams) {
    w.last = size.last;
    w.pool = size.pool;
    w.spare = size.spare;
    a.n_streams = n_streams;
    a.cells_per_stream = a.mask_cells = cells;
    a.slots = slots;
    a.capacity = slots + kMaxTokens;
    a.n_judges = n_streams == 1 ? kMaxTokens : 1;
    const size_t rows = size_t(n_streams) * a.capacity;
    books.resize(n_streams);
    window.resize(rows, -1);
    tokens = window;
    judges.resize(n_streams * a.n_judges, -1);
    order.resize(rows);
    sequence.resize(rows);
    leaving_cells.resize(rows);
    leaving_slots.resize(rows);
    hidden.resize(n_streams * cells / 32);
    w.books = books.data();
    w.cells = window.data();
    w.tokens = tokens.data();
    w.judges = judges.data();
    w.order = order.data();
    w.sequence = sequence.data();
    w.leaving_cells = leaving_cells.data();
    w.leaving_slots = leaving_slots.data();
    w.n_leaving = n_leaving.data();
    w.hidden = hidden.data();
    a.hidden_stream_stride = cells / 32;
  }
  WindowOn(const WindowOn&) = delete;  // the arguments point into it
  /// `mask` [tokens][cells of a stream].
  void update(const Vector<int64_t>& cells, const Vector<uint16_t>& mask) {
    begin(cells, mask);
    run();
  }
  /// The end of the last batch, without another.
  void finish() {
    a.part = WindowArgs::finish;
    a.n_tokens = 0;
    run();
    a.part = WindowArgs::whole;
  }
  void begin(const Vector<int64_t>& cells, const Vector<uint16_t>& mask) {
    marks.assign(cells.size(), 99);
    token_slots.assign(cells.size(), 99);
    a.n_tokens = a.mask_tokens = int(cells.size());
    a.cells = cells.data();
    a.mask = mask.data();
    a.mask_token_stride = n_cells;
    w.marks = marks.data();
    w.token_slots = token_slots.data();
  }
  void run() {
    layer[0] = w;
    a.layers = layer.data();
    Device::update_window(a);
  }
  int n_left() const { return n_leaving[(books[0].n_batches - 1) & 1]; }
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
    host.last = w.last;
    host.pool = w.pool;
    host.spare = w.spare;
    host.slots = slots;
    host.capacity = a.capacity;
    host.books.assign(books.begin(), books.end());
    host.cells.assign(window.begin(), window.end());
    host.order.assign(order.begin(), order.end());
    host.sequence.assign(sequence.begin(), sequence.end());
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
  LayerWindow w;
  WindowArgs a;
  Vector<LayerWindow> layer = Vector<LayerWindow>(1);
  Vector<WindowBooks> books;
  Vector<int32_t> window, tokens, judges, leaving_slots, token_slots;
  Vector<uint32_t> order, sequence, marks, hidden;
  Vector<int64_t> leaving_cells;
  Vector<int> n_leaving = Vector<int>(2);
};

#ifdef THIMBLE_SIMT_HOST
struct Emulation {
  template <typename T>
  using Vector = std::vector<T>;
  static void update_window(const WindowArgs& a) {
    simt::Machine::launch({a.n_layers, a.n_streams}, WindowKernel::kThreads, WindowKernel::kSharedBytes,
                          [&] { WindowKernel::run(a); });
  }
  static void judge_cells(const JudgeArgs& a) {
    simt::Machine::launch({a.list.max_entries / kJudgeTile, a.n_kv_heads, a.n_layers * a.n_streams},
                          JudgeKernel::kThreads, JudgeKernel::kSharedBytes, [&] { JudgeKernel::run(a); });
  }
  using Tables = HostTables;
  static HostTables tables_of(HostTables tables) { return tables; }
  template <int HeadDim>
  static void prepare_prompt(const PromptArgs& a) {
    using Kernel = PromptKernel<HeadDim>;
    simt::Machine::launch({Kernel::n_groups(a), a.batch.n_kv_heads}, Kernel::kThreads, Kernel::kSharedBytes,
                          [&] { Kernel::run(a); });
  }
};
using TestWindow = WindowOn<Emulation>;
#endif

}  // namespace thimble::cuda
