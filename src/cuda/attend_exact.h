// Decode attention: exact rows, which are neither transformed nor coded. They keep sums of their own, to which those of
// coded cells are added when the values' transform is undone.
//
// A warp takes whole rows, a lane its share of their components, for the block's 4 query rows.
#pragma once

#include "cuda/attend_cells.h"
#include "cuda/attend_parts.h"

namespace thimble::cuda {

template <typename S>
struct AttendExact {
  using Items = AttendItems<S>;
  using Cells = AttendCells<S>;
  using Row = typename Cells::Row;
  using Partials = AttendPartials<S>;
  static constexpr int D = S::kHeadDim, kRows = S::kRows;
  static constexpr int kShare = D / 32, kWords = kShare / 2;  // numbers of a row that a lane has, words of these
  static constexpr int kBatch = D == 256 ? 3 : 5;             // rows that are on their way at once

  /// Maximum and weight are those of query row lane % 4; the sums those of all 4.
  struct Running {
    float maximum = kNoMaximum, weight = 0;
    float sum[kRows][kShare] = {};
  };

  SIMT static bool any(const AttendArgs& a) { return a.exact[0].capacity + a.exact[1].capacity > 0; }

  /// Asks for the window's rows of a stream to come to L2.
  SIMT static void prefetch(const AttendArgs& a, int stream) {
    const size_t bytes = size_t(a.exact[0].capacity) * D * sizeof(uint16_t);
    const size_t first = (size_t(stream) * a.n_kv_heads + simt::block_y() / a.row_groups) * bytes;
    for (size_t i = simt::thread() * 128; i < bytes; i += S::kThreads * 128) {
      simt::prefetch_line(reinterpret_cast<const uint8_t*>(a.exact[0].keys) + first + i);
      simt::prefetch_line(reinterpret_cast<const uint8_t*>(a.exact[0].values) + first + i);
    }
  }

  template <int N>
  SIMT static void load_row(const uint16_t* p, uint32_t (&words)[N]) {
    if constexpr (N == 1) {
      words[0] = *reinterpret_cast<const uint32_t*>(p);
    } else {
      SIMT_UNROLL
      for (int i = 0; i < N; i += 2) {
        const uint2 v = *reinterpret_cast<const uint2*>(p + 2 * i);
        words[i] = v.x;
        words[i + 1] = v.y;
      }
    }
  }

  /// A new token's row, f32, rounded as the window holds it; into the window, too, if `to` is given.
  template <int N>
  SIMT static void take_row(const float* from, uint16_t* to, uint32_t (&words)[N]) {
    SIMT_UNROLL
    for (int i = 0; i < N; i++) {
      words[i] = simt::pack_half2(from[2 * i], from[2 * i + 1]);
      if (to) reinterpret_cast<uint32_t*>(to)[i] = words[i];
    }
  }

  /// Sums over the warp of 4 numbers a lane; each lane gets the one of its query row, lane % 4.
  SIMT static float reduce(int lane, const float (&x)[kRows]) {
    const bool odd = lane & 1, high = lane & 2;
    const float a = (odd ? x[1] : x[0]) + simt::shuffle_xor(odd ? x[0] : x[1], 1);
    const float b = (odd ? x[3] : x[2]) + simt::shuffle_xor(odd ? x[2] : x[3], 1);
    return Cells::over_g((high ? b : a) + simt::shuffle_xor(high ? a : b, 2), typename Cells::Add());
  }

  SIMT static void attend_rows(const AttendArgs& a, int stream, int which, const float (&query)[kRows][kShare],
                               Running& run) {
    const ExactRows& exact = a.exact[which];
    const int warp = simt::thread() / 32, lane = simt::thread() % 32;
    const Row row = Cells::make_row(a, stream, lane % kRows);
    const int head = simt::block_y() / a.row_groups;
    const size_t pair = size_t(stream) * a.n_kv_heads + head;
    const int32_t* cells = exact.cells + (exact.per_head ? pair : size_t(stream)) * exact.capacity;
    const int32_t* tokens = which == 0 && a.fresh.keys ? a.fresh.tokens + size_t(stream) * exact.capacity : nullptr;
    const bool writes = simt::block_y() % a.row_groups == 0;
    for (int first = warp; first < exact.capacity; first += kBatch * S::kWarps) {
      int cell[kBatch], token[kBatch];
      uint32_t key[kBatch][kWords], value[kBatch][kWords];
      SIMT_UNROLL
      for (int b = 0; b < kBatch; b++) {
        const int i = first + b * S::kWarps;
        cell[b] = token[b] = -1;
        if (i >= exact.capacity) continue;
        cell[b] = cells[i] < a.end_cell ? cells[i] : -1;
        if (tokens) token[b] = tokens[i];
        const size_t at = (pair * exact.capacity + i) * D + lane * kShare;
        load_row(exact.keys + at, key[b]);
        load_row(exact.values + at, value[b]);
      }
      float x[kBatch];
      SIMT_UNROLL
      for (int b = 0; b < kBatch; b++) {
        x[b] = a.mask && cell[b] >= 0 ? simt::half_to_float(a.mask[row.mask + cell[b]]) : 0.0f;
      }
      SIMT_UNROLL
      for (int b = 0; b < kBatch; b++) {
        if (token[b] < 0) continue;
        const size_t at = (pair * exact.capacity + first + b * S::kWarps) * D + lane * kShare;
        take_row(a.fresh.keys + token[b] * a.fresh.key_token_stride + head * a.fresh.key_head_stride + lane * kShare,
                 writes ? a.fresh.window_keys + at : nullptr, key[b]);
        take_row(
            a.fresh.values + token[b] * a.fresh.value_token_stride + head * a.fresh.value_head_stride + lane * kShare,
            writes ? a.fresh.window_values + at : nullptr, value[b]);
      }
      float top = kNoMaximum;
      SIMT_UNROLL
      for (int b = 0; b < kBatch; b++) {
        float dot[kRows] = {};
        SIMT_UNROLL
        for (int i = 0; i < kWords; i++) {
          const float2 k = simt::unpack_half2(key[b][i]);
          SIMT_UNROLL
          for (int r = 0; r < kRows; r++) dot[r] += query[r][2 * i] * k.x + query[r][2 * i + 1] * k.y;
        }
        float logit = reduce(lane, dot) * (a.scale * Cells::kLog2e);
        if (a.softcap != 0) logit = Cells::capped(logit, a.softcap);
        x[b] = cell[b] >= 0 ? logit + x[b] * row.slope() : -INFINITY;
        top = fmaxf(top, x[b]);
      }
      if (simt::any(top > run.maximum + 8)) {
        const float maximum = fmaxf(run.maximum, top), factor = simt::exp2_fast(run.maximum - maximum);
        run.maximum = maximum;
        run.weight *= factor;
        SIMT_UNROLL
        for (int r = 0; r < kRows; r++) {
          const float f = simt::shuffle(factor, r);
          SIMT_UNROLL
          for (int i = 0; i < kShare; i++) run.sum[r][i] *= f;
        }
      }
      SIMT_UNROLL
      for (int b = 0; b < kBatch; b++) {
        if (cell[b] < 0) continue;  // what lies there need not be a number
        const float p = simt::exp2_fast(x[b] - run.maximum);
        run.weight += p;
        SIMT_UNROLL
        for (int r = 0; r < kRows; r++) {
          const float weight = simt::shuffle(p, r);
          SIMT_UNROLL
          for (int i = 0; i < kWords; i++) {
            const float2 v = simt::unpack_half2(value[b][i]);
            run.sum[r][2 * i] += weight * v.x;
            run.sum[r][2 * i + 1] += weight * v.y;
          }
        }
      }
    }
  }

  /// Attends to all exact rows of a stream with the queries in shared memory, and leaves a partial result. The place of
  /// the score table must be free, and is afterwards.
  SIMT static void attend(const AttendArgs& a, int stream) {
    const int warp = simt::thread() / 32, lane = simt::thread() % 32;
    uint8_t* shared = simt::shared();
    float query[kRows][kShare];
    SIMT_UNROLL
    for (int r = 0; r < kRows; r++) {
      SIMT_UNROLL
      for (int i = 0; i < kShare; i++) {
        query[r][i] = reinterpret_cast<const float*>(shared + S::kQueries)[r * D + lane * kShare + i];
      }
    }
    Running run;
    SIMT_NO_UNROLL
    for (int which = 0; which < 2; which++) attend_rows(a, stream, which, query, run);
    float* sums = reinterpret_cast<float*>(shared + S::kSums);
    float* states = reinterpret_cast<float*>(shared + S::kStates);
    SIMT_UNROLL
    for (int r = 0; r < kRows; r++) {
      SIMT_UNROLL
      for (int i = 0; i < kShare; i++) {
        sums[(warp * kRows + r) * S::kSumStride + lane * kShare + i] = run.sum[r][i];
      }
    }
    if (lane < kRows) {
      states[warp * 8 + lane] = run.maximum;
      states[warp * 8 + 4 + lane] = run.weight;
    }
    simt::sync();
    float* partial = Partials::at(a, stream, a.n_splits);
    for (int o = simt::thread(); o < kRows * D; o += S::kThreads) {
      const int r = o / D, d = o % D;
      const Part part = combine(
          S::kWarps, [&](int i) { return states[i * 8 + r]; }, [&](int i) { return states[i * 8 + 4 + r]; },
          [&](int i) { return sums[(i * kRows + r) * S::kSumStride + d]; });
      Partials::leave(partial, o, part);
    }
    simt::sync();
  }
};

}  // namespace thimble::cuda
