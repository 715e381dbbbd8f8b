// Decode attention: which thread block works on what.
#pragma once

#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// An item is a split of a stream's cells, or all of them. A thread block serves one KV head and one group of 4 query
/// rows, and takes every blocks_x-th batch of items. Each item of a batch has a slot in shared memory and a share of
/// the warps.
template <typename S>
struct AttendItems {
  static constexpr int D = S::kHeadDim;

  SIMT static int batch_shift(const AttendArgs& a) { return S::kSlots > 1 ? a.batch_shift : 0; }
  SIMT static int n_batches(const AttendArgs& a) { return (n_items(a) + (1 << batch_shift(a)) - 1) >> batch_shift(a); }
  /// The first item of a batch.
  SIMT static int first_item(const AttendArgs& a, int batch) { return batch << batch_shift(a); }
  SIMT static int n_slots(const AttendArgs& a, int batch) {
    if constexpr (S::kSlots == 1) return 1;
    const int left = n_items(a) - first_item(a, batch), all = 1 << batch_shift(a);
    return left < all ? left : all;
  }
  /// Warps that share an item.
  SIMT static int n_warps(const AttendArgs& a) { return 1 << n_warps_log2(a); }
  SIMT static int n_warps_log2(const AttendArgs& a) { return (S::kWarps == 16 ? 4 : 3) - batch_shift(a); }
  SIMT static int slot_of(const AttendArgs& a, int warp) { return S::kSlots > 1 ? warp >> n_warps_log2(a) : 0; }

  /// The token and head of query row r of this thread block's 4. A row that only pads the group has a token from
  /// n_tokens on.
  struct QueryRow {
    int token, head;
  };
  SIMT static QueryRow query_row(const AttendArgs& a, int r) {
    const int row = simt::block_z() * S::kRows + r, token = int(uint32_t(row) * a.group_inverse >> 16);
    return {token, simt::block_y() * a.group + row - token * a.group};
  }
  /// The number of this thread block's KV head and row group.
  SIMT static int pair(const AttendArgs& a) { return simt::block_y() * a.row_groups + simt::block_z(); }

  SIMT static int stream_of(const AttendArgs& a, int item) {
    return a.n_splits == 1 ? item : int(simt::multiply_high(uint32_t(item), a.splits_inverse));
  }
  /// Whose cells a stream attends to: its own, or its sequence's.
  SIMT static int cells_of(const AttendArgs& a, int stream) {
    if constexpr (S::kPaged) return a.pages.sequences[stream];
    return stream;
  }
  /// The first block of 64 cells of a split. The first split takes exact_blocks fewer than the others.
  SIMT static int block_begin(const AttendArgs& a, int split) {
    const int larger = split < a.n_larger_splits ? split : a.n_larger_splits;
    const int at = split * a.split_blocks + larger - a.exact_blocks;
    return at > 0 ? at : 0;
  }
  SIMT static int n_items(const AttendArgs& a) { return a.n_streams * a.n_splits; }
};

}  // namespace thimble::cuda
