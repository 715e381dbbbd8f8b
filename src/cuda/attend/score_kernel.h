// The scores of all cells, for retrieval: the kernel's body. Thread blocks share the work as in attention, and keys are
// looked up as there.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cuda/attend/bytes.h"
#include "cuda/attend/cells.h"
#include "cuda/attend/items.h"
#include "cuda/attend/queries.h"
#include "cuda/attend/query_rows.h"
#include "cuda/attend/score_table.h"
#include "cuda/layout.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

template <typename S>
struct ScoreKernel {
  using Items = AttendItems<S>;
  using Queries = AttendQueries<S>;
  using Scores = ScoreTable<S>;
  using Rows = QueryRows<S>;
  using Cells = AttendCells<S>;
  using Lane = typename Cells::Lane;
  using Row = typename Rows::Row;
  static constexpr int MK = S::kKeySubspaces, kKeyLoads = Cells::kKeyLoads;

  /// Takes the greatest over the 4 query rows. x has the scores of row t and cells 8g .. 8g+7; lane (g, t) gets those
  /// of cells 8g + 2t and 8g + 2t + 1.
  SIMT static float2 over_rows(const Lane& l, const float (&x)[8]) {
    float y[4], z[2];
    SIMT_UNROLL
    for (int i = 0; i < 4; i++) {
      const bool high = l.t & 2;
      y[i] = fmaxf(high ? x[4 + i] : x[i], simt::shuffle_xor(high ? x[i] : x[4 + i], 2));
    }
    SIMT_UNROLL
    for (int i = 0; i < 2; i++) {
      const bool odd = l.t & 1;
      z[i] = fmaxf(odd ? y[2 + i] : y[i], simt::shuffle_xor(odd ? y[i] : y[2 + i], 1));
    }
    return make_float2(z[0], z[1]);
  }

  SIMT static void run(const ScoreArgs& args) {
    const AttendArgs& a = args.attend;
    simt::launch_dependents();
    const Lane l = Cells::make_lane(a);
    const int head = simt::block_y(), row_group = simt::block_z();
    Queries::copy_scales(a);
    Rows::store_slopes(a);
    simt::wait_for_previous_grid();
    for (int item = simt::block_x(); item < Items::n_items(a); item += simt::blocks_x()) {
      const int stream = Items::stream_of(a, item), split = item - stream * a.n_splits;
      const int end = Items::block_begin(a, split + 1);
      int index = Items::block_begin(a, split) + l.warp;
      const uint8_t* block =
          a.keys.data + stream * a.keys.stream_stride + head * a.keys.head_stride + index * a.keys.block_stride;
      // A block's codes are loaded while those of the block before it are looked up.
      uint4 next_codes[kKeyLoads], next_scales = make_uint4(0, 0, 0, 0);
      const auto load = [&] {
        SIMT_UNROLL
        for (int i = 0; i < kKeyLoads; i++) next_codes[i] = simt::load_stream(block + i * 512 + l.lane * 16);
        next_scales = simt::load_stream(block + MK * kBlockCells + l.g * 16);
      };
      if (index < end) load();

      simt::sync();  // all warps are done with the last item's table
      Queries::fetch(a, item);
      typename Scores::Words key_words;
      Scores::load(a, key_words);
      simt::wait_for_copies();
      simt::sync();
      const Row row = Rows::make_row(a, stream, 0, l.t);
      Queries::transform(a, 1);
      const bool pads = row_group * S::kRows + l.t >= a.n_tokens * a.group;
      Scores::fill(key_words, 0);
      simt::sync();
      const uint32_t* hidden =
          a.hidden ? a.hidden + stream * a.hidden_stream_stride + head * a.hidden_head_stride : nullptr;
      const size_t pair = size_t(stream) * a.n_kv_heads + head, n_blocks = a.n_cells / kBlockCells;
      float* scores = args.scores + (pair * a.row_groups + row_group) * a.n_cells;
      float* block_maxima = args.block_maxima + (pair * a.row_groups + row_group) * n_blocks;
      for (; index < end; index += S::kWarps) {
        uint4 codes[kKeyLoads];
        SIMT_UNROLL
        for (int i = 0; i < kKeyLoads; i++) codes[i] = next_codes[i];
        const uint4 scales = next_scales;
        block += S::kWarps * a.keys.block_stride;
        if (index + S::kWarps < end) load();
        uint4 mask = make_uint4(0, 0, 0, 0);
        if (a.mask) mask = simt::load_vector(a.mask + row.mask + index * kBlockCells + l.g * 8);
        const uint32_t skip = hidden ? hidden[index * 2 + l.g / 4] : 0;
        float x[8];
        Cells::table_scores(l, codes, x);
        SIMT_UNROLL
        for (int i = 0; i < 4; i++) {
          const float2 scale = simt::unpack_half2(word_of(scales, i));
          x[2 * i] *= scale.x;
          x[2 * i + 1] *= scale.y;
        }
        const float unit = Cells::adjust(a, row, x, mask, skip >> l.g % 4 * 8 & 255);
        const float offset = a.softcap == 0 ? row.offset() : 0.0f;
        SIMT_UNROLL
        for (int j = 0; j < 8; j++) x[j] = pads ? -INFINITY : x[j] * unit + offset;
        const float2 two = over_rows(l, x);
        *reinterpret_cast<float2*>(scores + index * kBlockCells + l.g * 8 + l.t * 2) = two;
        float greatest = fmaxf(two.x, two.y);
        SIMT_UNROLL
        for (int lanes = 1; lanes < 32; lanes *= 2) greatest = fmaxf(greatest, simt::shuffle_xor(greatest, lanes));
        if (l.lane == 0) block_maxima[index] = greatest;
        if (row_group == 0 && l.g % 4 == 0 && l.t == 0) {
          args.all_hidden[pair * (n_blocks * 2) + index * 2 + l.g / 4] = skip;
        }
      }
    }
  }
};

}  // namespace thimble::cuda
