// Cells of a layer to and from rows: the kernels' bodies.
#pragma once

#include "cuda/encode/hadamard.h"
#include "cuda/simt/simt.h"
#include "cuda/state/cell_args.h"
#include "cuda/state/code_packer.h"

namespace thimble::cuda {

/// Codes and scales between blocks and canonical vectors. Grid [n_kv_heads][groups of 64 entries of `cells`].
struct CodesKernel {
  static constexpr int kThreads = 256, kCells = 64;

  template <bool ToBlocks>
  SIMT static void run(const CellArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const CodePacker packer{a.is_key ? Kind::key : Kind::value, a.codec.order()};
    const int head = simt::block_y(), first = simt::block_x() * kCells, bytes = packer.vector_bytes();
    const int n = a.n - first < kCells ? a.n - first : kCells;
    uint8_t* head_data = a.cache.data + head * a.cache.head_stride;
    for (int i = simt::thread(); i < n * bytes; i += kThreads) {
      const int entry = first + i / bytes, byte = i % bytes;
      const int64_t cell = a.cells[entry];
      const int stream = int(cell / a.cells_per_stream), in_stream = int(cell % a.cells_per_stream);
      uint8_t& in_block = head_data[stream * a.cache.stream_stride + in_stream / kBlockCells * a.cache.block_stride +
                                    packer.place(byte, in_stream % kBlockCells)];
      uint8_t& in_vector = a.vectors[(size_t(entry) * a.n_kv_heads + head) * bytes + byte];
      if (ToBlocks) {
        in_block = in_vector;
      } else {
        in_vector = in_block;
      }
    }
  }
};

/// Rows as the model wrote them, or as close to these as is known. A warp takes one head's row of a cell. Grid
/// [n_kv_heads][groups of kWarps cells].
template <int HeadDim>
struct RowsKernel {
  static constexpr int D = HeadDim, kThreads = 256, kWarps = kThreads / 32, N = D / 32;
  static constexpr size_t kSharedBytes = size_t(kWarps) * D * sizeof(float);

  struct Row {
    int stream, cell, slot;
    size_t at;  // of its first number in `halves` and `floats`
  };
  SIMT static Row row(const CellArgs& a, int entry, int head) {
    const int64_t cell = a.cells[entry];
    return {int(cell / a.cells_per_stream), int(cell % a.cells_per_stream), a.slots ? a.slots[entry] : -1,
            entry * (a.row_stride ? a.row_stride : size_t(a.n_kv_heads) * D) + size_t(head) * D};
  }
  SIMT static uint16_t* in_window(const CellArgs& a, const Row& r, int head) {
    return a.window + ((size_t(r.stream) * a.n_kv_heads + head) * a.capacity + r.slot) * D;
  }
  SIMT static uint16_t* in_store(const CellArgs& a, const Row& r, int head) {
    return a.store + ((size_t(r.stream) * a.n_kv_heads + head) * a.cells_per_stream + r.cell) * D;
  }

  /// The vector that codes stand for, its transform undone, bit for bit as CacheSide::decode_row does it: numbers
  /// lane * N to lane * N + N - 1 of it. `y`: D numbers of shared memory that are the warp's.
  SIMT static void decode(const CellArgs& a, const Row& r, int head, float* y, float (&x)[1][N]) {
    const int lane = simt::thread() % 32;
    const CodePacker packer{a.is_key ? Kind::key : Kind::value, a.codec.order()};
    const int n_subspaces = packer.order.n_subspaces();
    const uint8_t* block = a.cache.data + r.stream * a.cache.stream_stride + head * a.cache.head_stride +
                           r.cell / kBlockCells * a.cache.block_stride;
    const int in_block = r.cell % kBlockCells;
    const int low = block[packer.place(n_subspaces, in_block)];
    const int high = block[packer.place(n_subspaces + 1, in_block)];
    const float scale = simt::half_to_float(uint16_t(low | high << 8));
    const float* words = a.codec.words + size_t(head) * D * kCodewords;
    for (int k = 0; k < N; k++) {
      const int d = lane * N + k, code = block[packer.place(packer.order.subspace_of(d), in_block)];
      x[0][k] = simt::mul_rn(code & 0x80 ? -scale : scale, words[size_t(d) * kCodewords + (code & 0x7f)]);
    }
    if (!a.codec.undo) return hadamard_warp<D>(x, lane);
    for (int k = 0; k < N; k++) y[lane * N + k] = x[0][k];
    simt::sync_warp();
    // x = y A^-1 + mean. Of keys, the matrix is there transposed.
    const float* undo = a.codec.undo + size_t(head) * D * D;
    for (int k = 0; k < N; k++) {
      const int d = lane * N + k;
      float sum = 0;
      for (int i = 0; i < D; i++) {
        sum = simt::add_rn(sum, simt::mul_rn(y[i], a.is_key ? undo[d * D + i] : undo[i * D + d]));
      }
      x[0][k] = simt::add_rn(sum, a.codec.mean[head * D + d]);
    }
    simt::sync_warp();
  }

  /// To `halves` or `floats`: from the window, else from the store, else from codes.
  SIMT static void read(const CellArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const int warp = simt::thread() / 32, lane = simt::thread() % 32, head = simt::block_y();
    const int entry = simt::block_x() * kWarps + warp;
    if (entry >= a.n || a.cells[entry] < 0) return;
    const Row r = row(a, entry, head);
    const uint16_t* exact = r.slot >= 0 ? in_window(a, r, head) : a.store ? in_store(a, r, head) : nullptr;
    float x[1][N];
    if (!exact) decode(a, r, head, reinterpret_cast<float*>(simt::shared()) + warp * D, x);
    for (int k = 0; k < N; k++) {
      const int d = lane * N + k;
      if (a.halves) a.halves[r.at + d] = exact ? exact[d] : simt::float_to_half(x[0][k]);
      if (a.floats) a.floats[r.at + d] = exact ? simt::half_to_float(exact[d]) : x[0][k];
    }
  }

  /// From `halves` to where exact rows are kept: the window and the store, as far as there are any.
  SIMT static void put(const CellArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const int lane = simt::thread() % 32, head = simt::block_y();
    const int entry = simt::block_x() * kWarps + simt::thread() / 32;
    if (entry >= a.n) return;
    const Row r = row(a, entry, head);
    for (int d = lane; d < D; d += 32) {
      if (r.slot >= 0) in_window(a, r, head)[d] = a.halves[r.at + d];
      if (a.store) in_store(a, r, head)[d] = a.halves[r.at + d];
    }
  }
};

/// Numbers of `halves` to `floats`, or those of `floats` rounded: to `halves` and in place. Grid [groups of kNumbers].
struct ConvertKernel {
  static constexpr int kThreads = 256, kNumbers = 8 * kThreads;

  template <bool Round>
  SIMT static void run(const CellArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const size_t first = size_t(simt::block_x()) * kNumbers, total = size_t(a.n) * a.n_kv_heads * a.head_dim;
    for (size_t i = first + simt::thread(); i < first + kNumbers && i < total; i += kThreads) {
      if (Round) a.halves[i] = simt::float_to_half(a.floats[i]);
      a.floats[i] = simt::half_to_float(a.halves[i]);
    }
  }
};

}  // namespace thimble::cuda
