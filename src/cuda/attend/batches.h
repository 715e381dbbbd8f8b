// Decode attention: what a thread block does with its batches besides coded cells: exact rows, new rows, queries to
// keep.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/attend/combine.h"
#include "cuda/attend/exact.h"
#include "cuda/attend/items.h"
#include "cuda/attend/parts.h"
#include "cuda/attend/queries.h"
#include "cuda/layout.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

template <typename S>
struct AttendBatches {
  using Items = AttendItems<S>;
  using Queries = AttendQueries<S>;
  using Exact = AttendExact<S>;
  using Combine = AttendCombine<S>;
  using Partials = AttendPartials<S>;

  /// Whether any cell of a batch's streams is attended to from its codes. It looks at mask and hidden cells only where
  /// every warp has at most one block of an item: in such a short context the window may hold all cells, and then no
  /// tables need to be made.
  SIMT static bool sees_codes(const AttendArgs& a, int warp, int lane, int batch) {
    const int n = a.n_cells / kBlockCells, n_slots = Items::n_slots(a, batch);
    if (n > S::kWarps || !(a.mask || a.hidden)) return n > 0;
    bool sees = false;
    SIMT_NO_UNROLL
    for (int i = warp; i < n * n_slots; i += S::kWarps) {
      const int slot = i / n, block = i - slot * n, head = simt::block_y();
      const int stream = Items::stream_of(a, Items::first_item(a, batch) + slot);
      uint32_t cells = 3;  // two of them, a lane
      if (a.hidden) {
        const size_t word =
            Items::cells_of(a, stream) * a.hidden_stream_stride + head * a.hidden_head_stride + block * 2 + lane / 16;
        cells = ~(a.hidden[word] >> lane % 16 * 2) & 3;
      }
      uint32_t masked = a.mask ? 3 : 0;
      for (int token = 0; masked != 0 && token < a.n_tokens; token++) {
        const size_t at = stream * a.mask_stream_stride + token * a.mask_token_stride + block * kBlockCells;
        const uint32_t pair = reinterpret_cast<const uint32_t*>(a.mask + at)[lane];
        masked &= uint32_t((pair & 0xffff) == 0xfc00) | uint32_t(pair >> 16 == 0xfc00) << 1;  // minus infinity
      }
      sees |= (cells & ~masked) != 0;
    }
    return simt::any_in_block(sees);
  }

  /// Writes the new rows of a batch's streams to the window.
  SIMT static void write_new_rows(const AttendArgs& a, int batch) {
    const int first = Items::first_item(a, batch), n_slots = Items::n_slots(a, batch);
    SIMT_NO_UNROLL
    for (int slot = 0; slot < n_slots; slot++) Exact::write_new_rows(a, Items::stream_of(a, first + slot));
  }
  /// Whether a batch attends to exact rows, which the first split of each stream does.
  SIMT static bool has_exact(const AttendArgs& a, int batch) {
    return batch == Items::stream_of(a, batch) * a.n_splits;
  }

  /// Attends to the exact rows of this block's batches, before any codes take registers. The first batch's queries and
  /// new rows must be on their way. Unless cells are `coded`, there is one batch, and this finishes its rows.
  SIMT static void attend_exact(const AttendArgs& a, bool coded) {
    const int first = simt::block_x();
    SIMT_NO_UNROLL
    for (int batch = first; batch < Items::n_batches(a); batch += simt::blocks_x()) {
      if (!has_exact(a, batch)) continue;
      if (batch != first) {
        Queries::fetch(a, batch);
        write_new_rows(a, batch);
      }
      simt::wait_for_copies();
      simt::sync();
      Exact::attend(a, batch, [&](int slot, int r, int lane, const typename Combine::Part& part) {
        if (coded) {
          const int stream = Items::stream_of(a, Items::first_item(a, batch) + slot);
          Partials::leave(Partials::at(a, stream, a.n_splits), r, lane, part);
        } else {
          Combine::finish_row(a, batch, slot, r, lane, {}, part);
        }
      });
      simt::sync();
    }
    if (first + simt::blocks_x() < Items::n_batches(a)) Queries::fetch(a, first);
  }
};

}  // namespace thimble::cuda
