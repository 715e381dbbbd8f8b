// Decode attention over codes: the kernels' body. layout.h has the order of codes, shape.h the tables; cells.h works on
// blocks of 64 cells, exact.h on exact rows, and combine.h adds their results up.
//
// Each warp takes whole blocks of 64 cells and has a running maximum and sums of its own. Where there are more streams
// than thread blocks, a thread block takes a batch of streams at once, so that what an item costs besides its cells is
// spent once a batch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/attend/batches.h"
#include "cuda/attend/bytes.h"
#include "cuda/attend/cells.h"
#include "cuda/attend/combine.h"
#include "cuda/attend/direct.h"
#include "cuda/attend/exact.h"
#include "cuda/attend/items.h"
#include "cuda/attend/queries.h"
#include "cuda/attend/query_rows.h"
#include "cuda/attend/score_table.h"
#include "cuda/attend/shared.h"
#include "cuda/attend/value_table.h"
#include "cuda/layout.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

template <typename S>
struct AttendKernel {
  static constexpr int D = S::kHeadDim, MK = S::kKeySubspaces, MV = S::kValueSubspaces;
  using Items = AttendItems<S>;
  using Queries = AttendQueries<S>;
  using Scores = ScoreTable<S>;
  using Values = ValueTable<S>;
  using Rows = QueryRows<S>;
  using Direct = AttendDirect<S>;
  using Cells = AttendCells<S>;
  using Exact = AttendExact<S>;
  using Batches = AttendBatches<S>;
  using Combine = AttendCombine<S>;
  using Shared = AttendShared<S>;
  using Lane = typename Cells::Lane;
  using Running = typename Cells::Running;
  using Row = typename Rows::Row;
  static constexpr int kKeyLoads = Cells::kKeyLoads, kValueLoads = Cells::kValueLoads;

  /// Where this KV head's block lies that a block table has as `page`.
  SIMT static const uint8_t* in_page(const CacheView& cache, int page) {
    return cache.data + simt::block_y() * cache.head_stride + page * cache.block_stride;
  }

  /// Finds this warp's blocks in b.batch, or in the first later batch of this thread block in which it has any. If
  /// there is none, b.batch becomes n_batches or more, and the pointers stay as they are.
  SIMT static void find(const AttendArgs& a, int warp, CellBlocks& b) {
    const int slot = Items::slot_of(a, warp), n_warps = Items::n_warps(a);
    for (; b.batch < Items::n_batches(a); b.batch += simt::blocks_x()) {
      const int item = Items::first_item(a, b.batch) + slot;
      if (S::kSlots > 1 && item >= Items::n_items(a)) continue;
      const int stream = Items::stream_of(a, item), split = item - stream * a.n_splits;
      const int head = simt::block_y();
      b.index = Items::block_begin(a, split) + warp - slot * n_warps;
      int end = Items::block_begin(a, split + 1);
      const int owner = Items::cells_of(a, stream);
      if constexpr (S::kPaged) end = end < a.pages.n_blocks[owner] ? end : a.pages.n_blocks[owner];
      b.left = (end - b.index + n_warps - 1) >> Items::n_warps_log2(a);
      if (b.left <= 0) continue;
      if constexpr (S::kPaged) {
        const int page = a.pages.table[size_t(owner) * a.pages.table_stride + b.index];
        b.keys = in_page(a.keys, page);
        b.values = in_page(a.values, page);
        return;
      }
      const auto at = [&](const CacheView& cache) {
        return cache.data + stream * cache.stream_stride + head * cache.head_stride + b.index * cache.block_stride;
      };
      b.keys = at(a.keys);
      b.values = at(a.values);
      return;
    }
  }

  SIMT static void run(const AttendArgs& a) {
    simt::launch_dependents();
    typename Values::Words value_words;
    Values::load(a, value_words);
    const Lane l = Cells::make_lane(a);
    const int stride = Items::n_warps(a);  // of a warp's blocks
    // Each warp keeps its next blocks in shared memory, as the inner loop needs the registers.
    CellBlocks* const place_of_next = simt::shared_at<CellBlocks, offsetof(Shared, next_blocks)>() + l.warp;
    CellBlocks next = {};
    next.batch = simt::block_x();
    find(a, l.warp, next);
    if (l.lane == 0) *place_of_next = next;
    simt::sync_warp();
    const uint8_t *keys = next.keys, *values = next.values;  // of the block whose loads are under way
    const uint32_t key_step = uint32_t(stride * a.keys.block_stride),
                   value_step = uint32_t(stride * a.values.block_stride);
    const auto prefetch = [&](int n) {  // of the n-th block after that
      simt::prefetch_l2<S::kKeyBlock>(keys, n * key_step, l.lane);
      simt::prefetch_l2<S::kValueBlock>(values, n * value_step, l.lane);
    };
    const auto prefetch_first = [&] {
      for (int n = 0; n < (S::kPaged ? 1 : 2) && n < next.left; n++) prefetch(n);
    };
    if constexpr (!S::kDirect) prefetch_first();
    constexpr int kShare = kCodewords * D / S::kWarps;  // of the head's codewords, for the keys' table
    simt::prefetch_l2<kShare>(reinterpret_cast<const uint8_t*>(a.key_codec.packed),
                              (simt::block_y() * S::kWarps + l.warp) * kShare, l.lane);
    const int first = simt::block_x();
    if (Exact::any(a) && Batches::has_exact(a, first)) {
      const int n_slots = Items::n_slots(a, first);
      SIMT_NO_UNROLL
      for (int slot = 0; slot < n_slots; slot++) {
        Exact::prefetch(a, Items::stream_of(a, Items::first_item(a, first) + slot));
      }
    }
    const auto load_scales = [&] {
      Queries::copy_scales(a);
      Rows::store_slopes(a);
    };
    if constexpr (!S::kDirect) load_scales();  // while the grid before this one ends
    // The value table does not depend on the grid before this one. A short context may not need a table.
    const bool is_short = Exact::any(a) && a.n_cells <= S::kWarps * kBlockCells;
    if (!is_short) Values::fill(value_words);
    simt::wait_for_previous_grid();

    Queries::fetch(a, first);
    if constexpr (S::kDirect) load_scales();  // while many queries are on their way
    bool coded = true;
    if (Exact::any(a)) {
      const bool is_alone = first + simt::blocks_x() >= Items::n_batches(a);
      coded = !is_alone || a.n_splits > 1 || Batches::sees_codes(a, l.warp, l.lane, first);
      if (Batches::has_exact(a, first)) Batches::write_new_rows(a, first);
    }
    if (coded && is_short) Values::fill(value_words);
    if (Exact::any(a)) Batches::attend_exact(a, coded);
    if (!coded) {
      Combine::write_output(a, first);
      return;
    }
    uint4 key_codes[kKeyLoads], value_codes[kValueLoads], key_scales, value_scales;
    const auto load_keys = [&] {
      SIMT_UNROLL
      for (int i = 0; i < kKeyLoads; i++) key_codes[i] = simt::load_stream(keys + i * 512 + l.lane * 16);
      if constexpr (!S::kStagesScales) key_scales = simt::load_stream(keys + MK * kBlockCells + l.g * 16);
    };
    const auto load_value_scales = [&] {
      if constexpr (!S::kStagesScales) value_scales = simt::load_stream(values + MV * kBlockCells + l.g * 16);
    };
    const auto load_values = [&](const uint8_t* p) {
      SIMT_UNROLL
      for (int i = 0; i < kValueLoads; i++) value_codes[i] = simt::load_stream(p + i * 512 + l.lane * 16);
    };
    if constexpr (!S::kDirect) {
      simt::wait_for_copies();
      simt::sync();
    }

    for (int batch = first; batch < Items::n_batches(a); batch += simt::blocks_x()) {
      const int slot = Items::slot_of(a, l.warp), head = simt::block_y();
      const int item = Items::first_item(a, batch) + slot;
      // A last batch may leave warps without an item.
      const int stream = Items::stream_of(a, S::kSlots == 1 || item < Items::n_items(a) ? item : 0);
      const Row row = Rows::make_row(a, stream, slot, l.t);
      if constexpr (S::kDirect) {
        typename Direct::Codewords codewords;
        Direct::load_codewords(a, codewords);
        simt::wait_for_copies();
        simt::sync();
        if (batch == first) prefetch_first();  // earlier, it would delay the copies of queries
        Direct::fill_queries(a, Items::n_slots(a, batch));
        Direct::fill_codewords(codewords);
      } else {
        typename Scores::Words key_words;
        Scores::load(a, key_words);
        const int n_slots = Items::n_slots(a, batch);
        Queries::transform(a, n_slots);
        SIMT_NO_UNROLL
        for (int i = 0; i < n_slots; i++) Scores::fill(key_words, i);
      }
      Running run;
      if (batch == first && next.left > 0) {  // earlier, reads of shared memory would wait for these loads
        load_keys();
        if constexpr (S::kDeep) load_values(values);
        load_value_scales();
      }
      simt::sync();
      if constexpr (!S::kDirect) Queries::fetch(a, batch + simt::blocks_x());

      // The warp's blocks of its next batch are found here: in the loop, divisions would wait for the loads in flight.
      const CellBlocks now = *place_of_next;
      simt::sync_warp();
      const bool mine = now.batch == batch;
      if (mine) {
        CellBlocks b = now;
        b.batch += simt::blocks_x();
        find(a, l.warp, b);
        if (l.lane == 0) *place_of_next = b;
      }
      simt::sync_warp();
      uint32_t mask_at = row.mask + now.index * kBlockCells + l.g * 8;
      uint32_t hidden_at = uint32_t(Items::cells_of(a, stream) * a.hidden_stream_stride + head * a.hidden_head_stride) +
                           now.index * 2 + l.g / 4;
      // Paged: the table's entries of the next block and the one behind it, which are there before loads need them.
      const int32_t* table = nullptr;
      int page = 0, page_behind = 0;
      if constexpr (S::kPaged) {
        table = a.pages.table + size_t(Items::cells_of(a, stream)) * a.pages.table_stride + now.index;
        if (mine && now.left > 1) page = table[stride];
        if (mine && now.left > 2) page_behind = table[2 * stride];
      }
      for (int left = mine ? now.left : 0; left > 0; left--, mask_at += stride * kBlockCells, hidden_at += stride * 2) {
        const uint8_t* these_values = values;
        uint4* const staged_scales = simt::shared_at<uint4, offsetof(Shared, scales)>() + l.warp * 16;
        if constexpr (S::kStagesScales) {
          simt::sync_warp();  // the last block's were read
          const int at = l.lane * 16;
          if (l.lane < 16) {
            simt::copy_async<16>(staged_scales + l.lane,
                                 l.lane < 8 ? keys + MK * kBlockCells + at : values + MV * kBlockCells - 128 + at);
          }
        }
        // After the warp's last block the pointers stay, and that block is loaded once more without use.
        if constexpr (S::kPaged) {
          keys = left > 1 ? in_page(a.keys, page) : place_of_next->keys;
          values = left > 1 ? in_page(a.values, page) : place_of_next->values;
          if (left > 2) {
            simt::prefetch_l2<S::kKeyBlock>(in_page(a.keys, page_behind), 0, l.lane);
            simt::prefetch_l2<S::kValueBlock>(in_page(a.values, page_behind), 0, l.lane);
          }
          page = page_behind;
          table += stride;
          if (left > 3) page_behind = table[2 * stride];
        } else {
          keys = left > 1 ? keys + key_step : place_of_next->keys;
          values = left > 1 ? values + value_step : place_of_next->values;
          if (left > 2) prefetch(1);
        }
        uint4* const staged_mask = simt::shared_at<uint4, offsetof(Shared, masks)>() + simt::thread();
        uint32_t* const staged_hidden = simt::shared_at<uint32_t, offsetof(Shared, hidden)>() + simt::thread();
        uint4 mask = make_uint4(0, 0, 0, 0);
        uint32_t skip = 0;  // bits of the lane's 8 cells
        if constexpr (S::kStaged) {
          // These come by way of shared memory. A load to a register would share its counter with loads of codes that
          // are issued later, so that its reader would wait for those, too; and registers are scarce.
          if (a.mask) simt::copy_async<16>(staged_mask, a.mask + mask_at);
          if (a.hidden) simt::copy_async<4>(staged_hidden, a.hidden + hidden_at);
        } else {
          if (a.mask) mask = simt::load_vector(a.mask + mask_at);
          if (a.hidden) skip = a.hidden[hidden_at] >> l.g % 4 * 8 & 255;
        }
        float x[8];
        if constexpr (!S::kDeep) {
          // These loads are issued when the keys' codes have arrived. The two share a counter, so that readers of the
          // keys' codes would otherwise wait for both. Direct kernels wait for the codes first, as they turn them.
          load_values(these_values + (S::kDirect ? 0 : simt::after(Cells::first_address(l, key_codes))));
        }
        Cells::scores(l, slot, key_codes, x);
        if constexpr (S::kStaged) {
          if (S::kStagesScales || a.mask || a.hidden) simt::wait_for_copies();
          if constexpr (S::kStagesScales) {
            simt::sync_warp();
            key_scales = staged_scales[l.g];
          }
          if (a.mask) mask = *staged_mask;
          if (a.hidden) skip = reinterpret_cast<const uint8_t*>(staged_hidden)[l.g % 4];
        }
        SIMT_UNROLL
        for (int i = 0; i < 4; i++) {
          const float2 scale = simt::unpack_half2(word_of(key_scales, i));
          x[2 * i] *= scale.x;
          x[2 * i + 1] *= scale.y;
        }
        const float unit = Cells::adjust(a, row, x, mask, skip);
        if constexpr (S::kDeep) load_keys();
        if constexpr (S::kStagesScales) value_scales = staged_scales[8 + l.g];
        typename Cells::Weights weights;
        const float sum_unit = Cells::weigh(l, run, x, unit, value_scales, weights);
        if constexpr (!S::kDeep) load_keys();
        Cells::add_values(l, run, value_codes, weights, sum_unit);
        if constexpr (S::kDeep) load_values(values);
        load_value_scales();
      }
      if (a.softcap == 0) run.maximum += row.offset();
      simt::wait_for_copies();
      run.weight = Cells::over_g(run.weight, typename Cells::Add());
      simt::sync();  // the keys' table is used up
      if (!Combine::finish_batch(a, batch, [&](int warp, int lane) { Cells::leave(run, warp, lane); })) continue;
      simt::sync();
      Combine::write_output(a, batch);
      if constexpr (!Shared::kOwnOutputs) simt::sync();
      if constexpr (S::kDirect) Queries::fetch(a, batch + simt::blocks_x());  // outputs had the queries' place
    }
  }
};

}  // namespace thimble::cuda
