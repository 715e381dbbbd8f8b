// Layers that are read as rows: the kernels' bodies. A warp takes one head's row of a cell.
#pragma once

#include "cuda/rows/row_args.h"
#include "cuda/rows/row_codec.h"
#include "cuda/simt/simt.h"

namespace thimble::cuda {

struct RowsOfAnySize {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;

  /// Two vectors and the codes of one for each warp.
  static constexpr size_t shared_bytes(int head_dim) { return kWarps * warp_bytes(head_dim); }

  /// CellArgs as RowsKernel takes them. Grid [n_kv_heads][groups of kWarps cells].
  SIMT static void read(const CellArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const int entry = simt::block_x() * kWarps + simt::thread() / 32, head = simt::block_y();
    if (entry >= a.n || a.cells[entry] < 0) return;
    const RowCodec codec{a};
    const RowPlace p = codec.place(a.cells[entry], head);
    const int slot = a.slots ? a.slots[entry] : -1;
    const uint16_t* exact = slot >= 0 ? codec.in_window(p, slot) : a.store ? codec.in_store(p) : nullptr;
    const size_t at = row_at(a, entry, head);
    for (int d = lane(); exact && d < a.head_dim; d += 32) {
      if (a.halves) a.halves[at + d] = exact[d];
      if (a.floats) a.floats[at + d] = simt::half_to_float(exact[d]);
    }
    if (exact) return;
    codec.decode(p, memory(a.head_dim), [&](int d, float x) {
      if (a.halves) a.halves[at + d] = simt::float_to_half(x);
      if (a.floats) a.floats[at + d] = x;
    });
  }

  SIMT static void put(const CellArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const int entry = simt::block_x() * kWarps + simt::thread() / 32, head = simt::block_y();
    if (entry >= a.n) return;
    const RowCodec codec{a};
    const RowPlace p = codec.place(a.cells[entry], head);
    const int slot = a.slots ? a.slots[entry] : -1;
    const uint16_t* row = a.halves + row_at(a, entry, head);
    for (int d = lane(); d < a.head_dim; d += 32) {
      if (slot >= 0) codec.in_window(p, slot)[d] = row[d];
      if (a.store) codec.in_store(p)[d] = row[d];
    }
  }

  /// Grid [n_kv_heads][blocks, which take groups of kWarps entries in turn].
  SIMT static void encode(const EncodeRowsArgs& e) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const CellArgs& a = e.side;
    const int head = simt::block_y();
    const int n = e.books ? e.n_leaving[e.books->n_batches & 1 ? 0 : 1] : a.n;
    const RowCodec codec{a};
    float* x = memory(a.head_dim);
    float* y = x + a.head_dim;
    uint8_t* codes = reinterpret_cast<uint8_t*>(y + a.head_dim);
    for (int entry = simt::block_x() * kWarps + simt::thread() / 32; entry < n; entry += simt::blocks_x() * kWarps) {
      if (a.cells[entry] < 0) continue;
      const RowPlace p = codec.place(a.cells[entry], head);
      const int slot = a.slots ? a.slots[entry] : -1;
      for (int d = lane(); d < a.head_dim; d += 32) {
        const uint16_t number = e.rows ? simt::float_to_half(e.rows[entry * e.row_stride + head * e.head_stride + d])
                                       : codec.in_window(p, slot)[d];
        if (e.rows && slot >= 0) codec.in_window(p, slot)[d] = number;
        if (e.rows && a.store) codec.in_store(p)[d] = number;
        x[d] = simt::half_to_float(number);
      }
      simt::sync_warp();
      // What is in the window is coded when it leaves; with a store, as it comes.
      if (!a.cache.data || (e.rows && slot >= 0 && !a.store)) continue;
      codec.transform(head, x, y);
      codec.encode(p, y, x, codes);
    }
  }

  /// Fills ReadRowsArgs::exact, which is zero before: from the window's rows, or, behind these, from those in flight.
  /// Grid [groups of kThreads rows].
  template <bool InFlight>
  SIMT static void mark(const ReadRowsArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const int i = simt::block_x() * kThreads + simt::thread();
    if (InFlight) {
      if (i >= a.flight.n || a.flight.cells[i] < 0) return;
      const int64_t cell = a.flight.cells[i];
      mark(a, int(cell / a.side.cells_per_stream), int(cell % a.side.cells_per_stream), -1 - i);
    } else {
      if (i >= a.n_streams * a.side.capacity) return;
      const int stream = a.first_stream + i / a.side.capacity, row = i % a.side.capacity;
      mark(a, stream, a.window_cells[size_t(stream) * a.side.capacity + row], row + 1);
    }
  }

  /// Grid [n_kv_heads][groups of kWarps cells].
  SIMT static void read_all(const ReadRowsArgs& r) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const CellArgs& a = r.side;
    const int i = simt::block_x() * kWarps + simt::thread() / 32, head = simt::block_y(), n = a.head_dim;
    if (i >= r.n_streams * r.n_cells) return;
    const int stream = i / r.n_cells, cell = i % r.n_cells, exact = r.exact[i];
    const size_t row_size = size_t(a.n_kv_heads) * n, stride = r.out_stride ? r.out_stride : row_size;
    const size_t stream_at = size_t(stream) * r.n_cells * stride;
    const auto write = [&](int d, uint16_t x) {
      const size_t number = size_t(head) * n + d;
      r.out[stream_at + (r.transposed ? number * r.n_cells + cell : cell * stride + number)] = x;
    };
    const RowCodec codec{a};
    const RowPlace p{r.first_stream + stream, cell, head};
    if (exact < 0) {
      const float* row = r.flight.rows + size_t(-1 - exact) * row_size + size_t(head) * n;
      for (int d = lane(); d < n; d += 32) write(d, simt::float_to_half(row[d]));
    } else if (exact > 0 || a.store) {
      const uint16_t* row = exact > 0 ? codec.in_window(p, exact - 1) : codec.in_store(p);
      for (int d = lane(); d < n; d += 32) write(d, row[d]);
    } else if (a.cache.data) {
      codec.decode(p, memory(n), [&](int d, float x) { write(d, simt::float_to_half(x)); });
    } else {
      for (int d = lane(); d < n; d += 32) write(d, 0);  // never written
    }
  }

  /// Grid [n_streams][n_judges].
  SIMT static void keep(const KeepQueriesArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const int stream = simt::block_y(), judge = simt::block_x();
    const int token = a.judges[stream * a.n_judges + judge], row = a.n_heads * a.head_dim;
    if (token < 0 || token >= a.n_tokens) return;
    const float* from = a.queries + stream * a.stream_stride + token * a.token_stride;
    float* to = a.kept + (size_t(stream) * a.n_judges + judge) * row;
    for (int i = simt::thread(); i < row; i += kThreads) {
      to[i] = from[i / a.head_dim * a.head_stride + i % a.head_dim];
    }
  }

private:
  static constexpr THIMBLE_HOST_DEVICE size_t warp_bytes(int head_dim) {
    return (2 * size_t(head_dim) * sizeof(float) + head_dim + 15) / 16 * 16;
  }
  SIMT static int lane() { return simt::thread() % 32; }
  SIMT static float* memory(int head_dim) {
    return reinterpret_cast<float*>(simt::shared() + simt::thread() / 32 * warp_bytes(head_dim));
  }
  SIMT static size_t row_at(const CellArgs& a, int entry, int head) {
    return entry * (a.row_stride ? a.row_stride : size_t(a.n_kv_heads) * a.head_dim) + size_t(head) * a.head_dim;
  }
  SIMT static void mark(const ReadRowsArgs& a, int stream, int cell, int32_t what) {
    const int of_batch = stream - a.first_stream;
    if (of_batch < 0 || of_batch >= a.n_streams || cell < 0 || cell >= a.n_cells) return;
    a.exact[size_t(of_batch) * a.n_cells + cell] = what;
  }
};

}  // namespace thimble::cuda
