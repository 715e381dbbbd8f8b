// Decode attention: exact rows, which are neither transformed nor coded. Their sums are kept apart from those of coded
// cells until the values' transform of the latter is undone.
//
// A warp takes 16 rows at a time and makes both products on the tensor cores. This keeps the code short, which matters
// more than the arithmetic, as each instruction runs once or twice and has to be fetched first. In a warp, lane (g, t)
// = (lane / 4, lane % 4).
//   scores:  A is the queries: rows 0 to 3 are rounded to f16, rows 4 to 7 are the remainders of that rounding, so that
//            the sum of both products is as exact as in f32. B is the keys. Lane (g, t) gets the scores of query row
//            g % 4 and rows 2t, 2t + 1, 2t + 8, 2t + 9, of which B of the second product is made.
//   values:  A is V transposed: the numbers of two rows side by side. Weights are rounded to f16, in their sum as well.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cuda/attend/bytes.h"
#include "cuda/attend/items.h"
#include "cuda/attend/parts.h"
#include "cuda/attend/query_rows.h"
#include "cuda/attend/rows.h"
#include "cuda/attend/shared.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

template <typename S>
struct AttendExact {
  static constexpr int D = S::kHeadDim, kRows = S::kRows;
  using Items = AttendItems<S>;
  using Rows = QueryRows<S>;
  using Row = typename Rows::Row;
  using Warps = WarpParts<S>;
  using Shared = AttendShared<S>;
  static constexpr int kTile = 16;                       // exact rows a warp takes at once
  static constexpr int kKeyLoads = D / 32;               // 16 bytes each, of each of a lane's two rows
  static constexpr int kValueLoads = D / 64;             // the same, of each of its four
  static constexpr int kSplitBytes = 2 * kRows * D * 2;  // f16 [2][4][D]: an item's queries in units of log2 e, in two
                                                         // parts: Shared::Results::split_queries
  static_assert(S::kSlots * kSplitBytes == sizeof(Shared::Results::split_queries));

  struct Running {
    float maximum = kNoMaximum, weight = 0;  // of query row g % 4; weight: this lane's share, to be added over t
    float sum[4 * kValueLoads][4] = {};      // [16 components][2 components x query rows 2t, 2t + 1]; t < 2
  };

  SIMT static bool any(const AttendArgs& a) { return a.exact[0].capacity + a.exact[1].capacity > 0; }

  /// Asks for the window's rows of a stream to come to L2. (Its cells may be those of a step before.)
  SIMT static void prefetch(const AttendArgs& a, int stream) {
    if constexpr (S::kPaged) return;
    const size_t bytes = size_t(a.exact[0].capacity) * D * sizeof(uint16_t);
    const size_t first = (size_t(stream) * a.n_kv_heads + simt::block_y()) * bytes;
    SIMT_NO_UNROLL
    for (size_t i = simt::thread() * 128; i < bytes; i += S::kThreads * 128) {
      if (a.exact[0].cells[size_t(stream) * a.exact[0].capacity + i / (D * sizeof(uint16_t))] < 0) continue;
      simt::prefetch_line(reinterpret_cast<const uint8_t*>(a.exact[0].keys) + first + i);
      simt::prefetch_line(reinterpret_cast<const uint8_t*>(a.exact[0].values) + first + i);
    }
  }

  /// Writes a stream's new rows to the window, rounded to f16. Threads of this block may read them after a barrier;
  /// thread blocks of other query rows write the same numbers for themselves. The queries of a token that will decide
  /// which cells leave the window are kept (LayerWindow::tokens).
  SIMT static void write_new_rows(const AttendArgs& a, int stream) {
    if (!a.fresh.keys) return;
    const int lane = simt::thread() % 32, head = simt::block_y(), capacity = a.exact[0].capacity;
    const int32_t* tokens = a.fresh.tokens + size_t(stream) * capacity;
    const size_t pair = size_t(stream) * a.n_kv_heads + head;
    SIMT_NO_UNROLL
    for (int first = simt::thread() - lane; first < capacity; first += S::kThreads) {
      const int mine = first + lane < capacity ? tokens[first + lane] : -1;
      SIMT_NO_UNROLL
      for (uint32_t found = simt::ballot(mine >= 0); found != 0; found &= found - 1) {
        const int i = simt::popcount((found & (0 - found)) - 1), word = simt::shuffle(mine, i);
        const int token = word & ((1 << kJudgeShift) - 1);
        const float* key = a.fresh.keys + token * a.fresh.key_token_stride + head * a.fresh.key_head_stride;
        const float* value = a.fresh.values + token * a.fresh.value_token_stride + head * a.fresh.value_head_stride;
        const size_t at = (pair * capacity + first + i) * D;
        SIMT_NO_UNROLL
        for (int d = 2 * lane; d < D; d += 64) {
          const uint32_t k = simt::pack_half2(key[d], key[d + 1]), v = simt::pack_half2(value[d], value[d + 1]);
          *reinterpret_cast<uint32_t*>(a.fresh.window_keys + at + d) = k;
          *reinterpret_cast<uint32_t*>(a.fresh.window_values + at + d) = v;
        }
        if (word >> kJudgeShift == 0) continue;
        const int judge = (word >> kJudgeShift) - 1, n = a.group * D;
        const float* from =
            a.queries + stream * a.query_stream_stride + (token - stream * a.n_tokens) * a.query_token_stride;
        float* to = a.kept_queries + ((size_t(stream) * a.n_judges + judge) * a.n_kv_heads + head) * n;
        SIMT_NO_UNROLL
        for (int d = 4 * lane; d < n; d += 128) {
          *reinterpret_cast<float4*>(to + d) =
              *reinterpret_cast<const float4*>(from + (head * a.group + d / D) * a.query_head_stride + d % D);
        }
      }
    }
  }

  /// Makes A of the first product from the queries in shared memory, which are as the model wrote them.
  SIMT static void split_queries(const AttendArgs& a, int n_slots) {
    const float unit = a.scale * kLog2e;
    SIMT_NO_UNROLL
    for (int i = simt::thread(); i < n_slots * kRows * D; i += S::kThreads) {
      const float x = simt::shared_at<float, offsetof(Shared, queries)>()[i] * unit;
      const uint16_t rounded = simt::float_to_half(x);
      uint16_t* to =
          simt::shared_at<uint16_t, offsetof(Shared, results.split_queries)>() + i + i / (kRows * D) * (kRows * D);
      to[0] = rounded;
      to[kRows * D] = simt::float_to_half(x - simt::half_to_float(rounded));
    }
  }

  /// Where exact row i of those of a stream and KV head begins, in numbers.
  SIMT static size_t place(const AttendArgs& a, size_t rows_begin, int i, size_t paged_stride) {
    if constexpr (S::kPaged) return a.pages.rows[rows_begin + i] * paged_stride + size_t(simt::block_y()) * D;
    return (rows_begin + i) * D;
  }

  /// Adds 16 rows from `first` on, of those of a stream and KV head, to `run`.
  SIMT static void attend_tile(const AttendArgs& a, const ExactRows& exact, const int32_t* cells, size_t rows_begin,
                               const Row& row, int first, bool is_first, Running& run) {
    const int lane = simt::thread() % 32, g = lane / 4, t = lane % 4, last = exact.capacity - 1;
    int cell[4], index[4];
    SIMT_UNROLL
    for (int e = 0; e < 4; e++) {
      index[e] = first + 2 * t + e % 2 + e / 2 * 8;
      cell[e] = index[e] <= last ? cells[index[e]] : -1;
    }
    // A window that has room for several sequences is mostly empty.
    if (!simt::any(cell[0] >= 0 || cell[1] >= 0 || cell[2] >= 0 || cell[3] >= 0)) return;
    float x[4];
    SIMT_UNROLL
    for (int half = 0; half < 2; half++) {
      const int i = first + g + half * 8;
      const uint16_t* key = exact.keys + place(a, rows_begin, i < last ? i : last, a.pages.key_row_stride) + t * 8;
      const uint8_t* query =
          simt::shared() + offsetof(Shared, results.split_queries) + row.slot * kSplitBytes + (g * D + t * 8) * 2;
      float d[4] = {};
      SIMT_UNROLL
      for (int c = 0; c < kKeyLoads; c++) {
        const uint4 k = *reinterpret_cast<const uint4*>(key + c * 32);
        const uint4 q = *reinterpret_cast<const uint4*>(query + c * 64);
        simt::mma_f16(d, q.x, 0, q.y, 0, k.x, k.y);
        simt::mma_f16(d, q.z, 0, q.w, 0, k.z, k.w);
      }
      x[half * 2] = d[0];
      x[half * 2 + 1] = d[1];
    }
    float greatest = kNoMaximum;
    SIMT_UNROLL
    for (int e = 0; e < 4; e++) {
      const bool is_seen = cell[e] >= 0 && cell[e] < a.end_cell;
      x[e] += simt::shuffle_xor(x[e], 16);
      if (a.softcap != 0) x[e] = Rows::capped(x[e], a.softcap);
      if (a.mask && is_seen) x[e] += simt::half_to_float(a.mask[row.mask + cell[e]]) * row.slope();
      if (!is_seen) {
        x[e] = -INFINITY;
        cell[e] = -1;
      }
      greatest = fmaxf(greatest, x[e]);
    }
    greatest = fmaxf(greatest, simt::shuffle_xor(greatest, 1));
    greatest = fmaxf(greatest, simt::shuffle_xor(greatest, 2));
    if (simt::any(greatest > run.maximum + 8)) {
      const float maximum = fmaxf(run.maximum, greatest), factor = simt::exp2_fast(run.maximum - maximum);
      run.maximum = maximum;
      if (!is_first) {
        run.weight *= factor;
        const float f0 = simt::shuffle(factor, t % 2 * 8), f1 = simt::shuffle(factor, t % 2 * 8 + 4);
        SIMT_UNROLL
        for (int i = 0; i < 4 * kValueLoads; i++) {
          SIMT_UNROLL
          for (int k = 0; k < 4; k++) run.sum[i][k] *= k % 2 ? f1 : f0;
        }
      }
    }
    uint32_t weights[2];
    SIMT_UNROLL
    for (int half = 0; half < 2; half++) {
      weights[half] =
          simt::pack_half2(simt::exp2_fast(x[half * 2] - run.maximum), simt::exp2_fast(x[half * 2 + 1] - run.maximum));
      const float2 rounded = simt::unpack_half2(weights[half]);
      run.weight += rounded.x + rounded.y;
      if (g >= kRows) weights[half] = 0;
    }
    SIMT_UNROLL
    for (int c = 0; c < kValueLoads; c++) {
      uint4 v[4];
      SIMT_UNROLL
      for (int e = 0; e < 4; e++) {
        v[e] = make_uint4(0, 0, 0, 0);  // unused rows may hold anything, also NaN
        if (cell[e] >= 0) {
          v[e] = *reinterpret_cast<const uint4*>(
              exact.values + place(a, rows_begin, index[e], a.pages.value_row_stride) + c * 64 + g * 8);
        }
      }
      SIMT_UNROLL
      for (int w = 0; w < 4; w++) {
        uint32_t word[4];
        SIMT_UNROLL
        for (int e = 0; e < 4; e++) word[e] = word_of(v[e], w);
        simt::mma_f16(run.sum[c * 4 + w], simt::permute(word[0], word[1], 0x5410),
                      simt::permute(word[0], word[1], 0x7632), simt::permute(word[2], word[3], 0x5410),
                      simt::permute(word[2], word[3], 0x7632), weights[0], weights[1]);
      }
    }
  }

  /// Attends to all exact rows of a batch of streams with the queries in shared memory. Calls leave(slot, r, lane,
  /// part) for each query row, in the warp (slot * 4 + r) % kWarps. It uses the place of the keys' table, which the
  /// caller may fill after a barrier.
  template <typename Leave>
  SIMT static void attend(const AttendArgs& a, int batch, Leave leave) {
    const int warp = simt::thread() / 32, lane = simt::thread() % 32, g = lane / 4, t = lane % 4;
    const int n_slots = Items::n_slots(a, batch), n_warps = Items::n_warps(a), slot = Items::slot_of(a, warp);
    split_queries(a, n_slots);
    simt::sync();
    const int stream = Items::stream_of(a, Items::first_item(a, batch) + (slot < n_slots ? slot : 0));
    const int owner = Items::cells_of(a, stream);
    const size_t pair = size_t(owner) * a.n_kv_heads + simt::block_y();
    const Row row = Rows::make_row(a, stream, slot, g % kRows);
    const int window_tiles = (a.exact[0].capacity + kTile - 1) / kTile;
    const int n_tiles = window_tiles + (a.exact[1].capacity + kTile - 1) / kTile;
    const int own_first = warp - slot * n_warps;
    Running run;
    SIMT_NO_UNROLL
    for (int tile = own_first; tile < n_tiles && slot < n_slots; tile += n_warps) {
      const bool is_window = tile < window_tiles;
      const ExactRows& exact = is_window ? a.exact[0] : a.exact[1];
      const int32_t* cells = exact.cells + (exact.per_head ? pair : size_t(owner)) * exact.capacity;
      const int first = (is_window ? tile : tile - window_tiles) * kTile;
      attend_tile(a, exact, cells, (S::kPaged ? size_t(owner) : pair) * exact.capacity, row, first, tile == own_first,
                  run);
    }
    if (t < kRows / 2) {
      SIMT_UNROLL
      for (int i = 0; i < 4 * kValueLoads; i++) {
        const int d = i / 4 * 64 + g * 8 + i % 4 * 2;
        write_floats(Warps::sums(warp, 2 * t) + d, {run.sum[i][0], run.sum[i][2]});
        write_floats(Warps::sums(warp, 2 * t + 1) + d, {run.sum[i][1], run.sum[i][3]});
      }
    }
    run.weight += simt::shuffle_xor(run.weight, 1);
    run.weight += simt::shuffle_xor(run.weight, 2);
    if (t == 0 && g < kRows) Warps::leave_state(warp, g, run.maximum, run.weight);
    simt::sync();
    SIMT_NO_UNROLL
    for (int i = warp; i < n_slots * kRows; i += S::kWarps) {
      const int from = i / kRows, r = i % kRows;
      leave(from, r, lane, Warps::add_up(from * n_warps, n_tiles < n_warps ? n_tiles : n_warps, r, lane));
    }
  }
};

}  // namespace thimble::cuda
