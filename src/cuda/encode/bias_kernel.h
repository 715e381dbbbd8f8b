// What coded cells' scores lack (HeadCodec::score_bias), for dense attention over decoded rows: the kernels' bodies.
//
// A dot product has no place for a summand that depends on the query and on whether the cell is coded. So one component
// of the transformed vectors carries it: of coded cells the keys' becomes 1, of exact ones 0, and the queries' becomes
// the summand. The component whose numbers are smallest is taken, which adds least to the scores: a calibrated
// transform orders components by what they add.
//
// With DecodeArgs::shift a second component, of all cells 1, carries what the means of the two add to every score.
#pragma once

#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

struct BiasKernel {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;

  struct Carriers {
    int bias, shift;
  };
  SIMT static Carriers carriers(const BiasArgs& a, int head) {
    return {simt::load_constant(a.codec.carriers + 2 * head), simt::load_constant(a.codec.carriers + 2 * head + 1)};
  }

  /// Of all cells, as if they were coded. Grid [n_kv_heads][groups of kThreads cells of all streams].
  SIMT static void coded(const BiasArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const int i = simt::block_x() * kThreads + simt::thread(), head = simt::block_y();
    if (i < a.rows.n_streams * a.rows.n_cells) set(a, head, i / a.rows.n_cells, i % a.rows.n_cells, true);
  }

  /// Of the window's cells and of the batch's. Grid [n_kv_heads][groups of kThreads of these].
  SIMT static void exact(const BiasArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const int i = simt::block_x() * kThreads + simt::thread(), n_window = a.n_window_streams * a.capacity;
    int64_t cell = -1;
    int stream = 0;
    if (i < n_window) {
      cell = a.window_cells[i];
      stream = i / a.capacity;
    } else if (i < n_window + a.n_tokens && a.cells[i - n_window] >= 0) {
      cell = a.cells[i - n_window] % a.cells_per_stream;
      stream = int(a.cells[i - n_window] / a.cells_per_stream);
    }
    stream -= a.rows.first_stream;
    if (cell < 0 || cell >= a.rows.n_cells || stream < 0 || stream >= a.rows.n_streams) return;
    set(a, simt::block_y(), stream, int(cell), false);
  }

  /// Of transformed queries, [n_queries][n_kv_heads * group][head_dim]. A warp takes one. Grid [groups of kWarps].
  SIMT static void queries(const BiasArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const int i = simt::block_x() * kWarps + simt::thread() / 32, lane = simt::thread() % 32;
    const int head = i % (a.rows_kv_heads * a.group) / a.group, n = a.codec.head_dim;
    if (i >= a.n_queries * a.rows_kv_heads * a.group) return;
    float* q = a.queries + size_t(i) * n;
    const float* error = a.codec.error + size_t(head) * n;
    float bias = 0;
    for (int d = lane; d < n; d += 32) bias += 0.5f * a.scale * q[d] * q[d] * simt::load_constant(error + d);
    for (int mask = 1; mask < 32; mask *= 2) bias += simt::shuffle_xor(bias, mask);
    if (lane != 0) return;
    const Carriers c = carriers(a, head);
    if (a.rows.key_shift) {
      const float* shift = a.rows.key_shift + size_t(head) * n;
      q[c.shift] = q[c.bias] * shift[c.bias] + q[c.shift] * shift[c.shift];
    }
    q[c.bias] = bias;
  }

private:
  SIMT static void set(const BiasArgs& a, int head, int stream, int cell, bool coded) {
    constexpr uint16_t kOne = 0x3c00;
    const Carriers c = carriers(a, head);
    uint16_t* row =
        a.rows.keys + ((size_t(stream) * a.rows_kv_heads + head) * a.rows.n_cells + cell) * a.codec.head_dim;
    row[c.bias] = coded ? kOne : uint16_t(0);
    if (a.rows.key_shift) row[c.shift] = kOne;
  }
};

}  // namespace thimble::cuda
