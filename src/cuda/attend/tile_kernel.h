// Decode attention over tiles, and the scores of all cells from tiles: the kernels' bodies. Thread blocks share the
// work as in kernel.h, and exact rows, partial results and outputs are dealt with by the same code.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cuda/attend/batches.h"
#include "cuda/attend/combine.h"
#include "cuda/attend/exact.h"
#include "cuda/attend/items.h"
#include "cuda/attend/queries.h"
#include "cuda/attend/query_rows.h"
#include "cuda/attend/shared.h"
#include "cuda/attend/tile_cells.h"
#include "cuda/layout.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

template <typename S>
struct TileKernel {
  using Items = AttendItems<S>;
  using Queries = AttendQueries<S>;
  using Rows = QueryRows<S>;
  using Row = typename Rows::Row;
  using Exact = AttendExact<S>;
  using Batches = AttendBatches<S>;
  using Combine = AttendCombine<S>;
  using Cells = TileCells<S>;
  using Shared = AttendShared<S>;

  /// The first block of cells of an item. A warp takes every kWarps-th.
  SIMT static int block_begin(const AttendArgs& a, int stream, int item) {
    return Items::block_begin(a, item - stream * a.n_splits);
  }
  SIMT static const uint8_t* block_at(const CacheView& cache, int stream, int index) {
    return cache.data + stream * cache.stream_stride + simt::block_y() * cache.head_stride + index * cache.block_stride;
  }
  SIMT static void prefetch(const CacheView& cache, int stream, int index, int lane) {
    const uint8_t* block = block_at(cache, stream, index);
    SIMT_NO_UNROLL
    for (size_t i = lane * 128; i < cache.block_stride; i += 32 * 128) simt::prefetch_line(block + i);
  }

  /// Makes what the scores of an item need, of the queries that are on their way to shared memory.
  SIMT static void prepare(const AttendArgs& a) {
    simt::wait_for_copies();
    simt::sync();
    Cells::transform_queries(a);
    Cells::copy_words(a.key_codec, simt::shared());  // in whose place products with matrices were
    simt::wait_for_copies();
    simt::sync();
  }

  SIMT static void attend(const AttendArgs& a) {
    simt::launch_dependents();
    const int warp = simt::thread() / 32, lane = simt::thread() % 32, first = simt::block_x();
    Cells::copy_scales(a.key_codec, simt::shared() + offsetof(Shared, key_scales));
    Cells::copy_scales(a.value_codec, simt::shared() + offsetof(Shared, value_scales));
    Cells::copy_words(a.value_codec, simt::shared() + offsetof(Shared, value_table));
    Rows::store_slopes(a);
    simt::wait_for_previous_grid();
    Queries::fetch(a, first);
    bool coded = true;
    if (Exact::any(a)) {
      const bool is_alone = first + simt::blocks_x() >= Items::n_batches(a);
      coded = !is_alone || a.n_splits > 1 || Batches::sees_codes(a, warp, lane, first);
      if (Batches::has_exact(a, first)) Batches::write_new_rows(a, first);
      Batches::attend_exact(a, coded);
    }
    if (!coded) {
      Combine::write_output(a, first);
      return;
    }
    SIMT_NO_UNROLL
    for (int batch = first; batch < Items::n_batches(a); batch += simt::blocks_x()) {
      const int stream = Items::stream_of(a, batch);
      const int begin = block_begin(a, stream, batch) + warp, end = block_begin(a, stream, batch + 1);
      if (begin < end) {
        prefetch(a.keys, stream, begin, lane);
        prefetch(a.values, stream, begin, lane);
      }
      prepare(a);
      const Row row = Rows::make_row(a, stream, 0, lane / 4 % S::kRows);
      typename Cells::Running run;
      SIMT_NO_UNROLL
      for (int index = begin; index < end; index += S::kWarps) {
        if (index + S::kWarps < end) {
          prefetch(a.keys, stream, index + S::kWarps, lane);
          prefetch(a.values, stream, index + S::kWarps, lane);
        }
        typename Cells::Logits x;
        Cells::score(a, row, stream, block_at(a.keys, stream, index), index, x);
        Cells::add(a, block_at(a.values, stream, index), x, run);
      }
      simt::sync();  // the keys' codewords are used up
      if (Combine::finish_batch(a, batch, [&](int w, int l) { Cells::leave(run, w, l); })) {
        simt::sync();
        Combine::write_output(a, batch);
      }
      simt::sync();
      Queries::fetch(a, batch + simt::blocks_x());
    }
  }

  SIMT static void score(const ScoreArgs& args) {
    const AttendArgs& a = args.attend;
    simt::launch_dependents();
    const int warp = simt::thread() / 32, lane = simt::thread() % 32, g = lane / 4, t = lane % 4;
    const int head = simt::block_y(), row_group = simt::block_z();
    Cells::copy_scales(a.key_codec, simt::shared() + offsetof(Shared, key_scales));
    Rows::store_slopes(a);
    simt::wait_for_previous_grid();
    SIMT_NO_UNROLL
    for (int item = simt::block_x(); item < Items::n_items(a); item += simt::blocks_x()) {
      const int stream = Items::stream_of(a, item);
      simt::sync();  // all warps are done with the last item's queries
      Queries::fetch(a, item);
      prepare(a);
      const int r = g % S::kRows;
      const Row row = Rows::make_row(a, stream, 0, r);
      const bool pads = row_group * S::kRows + r >= a.n_tokens * a.group;
      const uint32_t* hidden =
          a.hidden ? a.hidden + stream * a.hidden_stream_stride + head * a.hidden_head_stride : nullptr;
      const size_t pair = size_t(stream) * a.n_kv_heads + head, n_blocks = a.n_cells / kBlockCells;
      float* scores = args.scores + (pair * a.row_groups + row_group) * a.n_cells;
      float* block_maxima = args.block_maxima + (pair * a.row_groups + row_group) * n_blocks;
      const int end = block_begin(a, stream, item + 1);
      SIMT_NO_UNROLL
      for (int index = block_begin(a, stream, item) + warp; index < end; index += S::kWarps) {
        if (index + S::kWarps < end) prefetch(a.keys, stream, index + S::kWarps, lane);
        typename Cells::Logits x;
        Cells::score(a, row, stream, block_at(a.keys, stream, index), index, x);
        float greatest = -INFINITY;
        SIMT_UNROLL
        for (int i = 0; i < 8; i++) {
          SIMT_UNROLL
          for (int e = 0; e < 2; e++) {  // over the 4 query rows
            x[i][e] = pads ? -INFINITY : x[i][e];
            x[i][e] = fmaxf(x[i][e], simt::shuffle_xor(x[i][e], 4));
            x[i][e] = fmaxf(x[i][e], simt::shuffle_xor(x[i][e], 8));
          }
          greatest = fmaxf(greatest, fmaxf(x[i][0], x[i][1]));
          if (g != i) continue;
          *reinterpret_cast<float2*>(scores + index * kBlockCells + 8 * i + 2 * t) = make_float2(x[i][0], x[i][1]);
        }
        greatest = fmaxf(greatest, simt::shuffle_xor(greatest, 1));
        greatest = fmaxf(greatest, simt::shuffle_xor(greatest, 2));
        if (lane == 0) block_maxima[index] = greatest;
        if (row_group == 0 && lane < 2) {
          args.all_hidden[pair * (n_blocks * 2) + index * 2 + lane] = hidden ? hidden[index * 2 + lane] : 0;
        }
      }
    }
  }
};

}  // namespace thimble::cuda
