// Decode attention: how work is dealt out, and the tables in shared memory (attend_shape.h).
#pragma once

#include "cuda/attend_shape.h"
#include "cuda/simt.h"

namespace thimble::cuda {

/// Items are splits of a stream's cells. A thread block serves one KV head and one group of 4 query rows, and takes
/// every blocks_x-th item.
template <typename S>
struct AttendItems {
  static constexpr int D = S::kHeadDim;

  // Divisions are slow, and there is seldom anything to divide.
  SIMT static int stream_of(const AttendArgs& a, int item) { return a.n_splits == 1 ? item : item / a.n_splits; }
  SIMT static int block_begin(const AttendArgs& a, int split) {
    return a.n_splits == 1 ? a.n_cells / kBlockCells * split
                           : int(uint32_t(a.n_cells / kBlockCells) * split / a.n_splits);
  }
  SIMT static int n_items(const AttendArgs& a) { return a.n_streams * a.n_splits; }

  /// The first of this block's query rows, among all streams' and heads'.
  SIMT static size_t first_row(const AttendArgs& a, int stream) {
    const int head = simt::block_y() / a.row_groups, row_group = simt::block_y() % a.row_groups;
    return ((size_t(stream) * a.n_kv_heads + head) * a.row_groups + row_group) * S::kRows;
  }
};

template <typename S>
struct AttendTables {
  using Items = AttendItems<S>;
  static constexpr int D = S::kHeadDim, MK = S::kKeySubspaces, MV = S::kValueSubspaces;

  SIMT static uint32_t negate_bytes(uint32_t x) {  // -128 does not occur
    return ((~x & 0x7f7f7f7f) + 0x01010101) ^ (~x & 0x80808080);
  }

  // The value table, in two steps: while the codewords are on their way, other things can be asked for.
  static constexpr int kEntryWords = S::kEntryBytes / 4, kRowEntries = S::kUnits * 8;
  static constexpr int kThreadEntries = kCodewords * kRowEntries / S::kThreads;
  static_assert(kCodewords * kRowEntries % S::kThreads == 0);
  using ValueWords = uint32_t[kThreadEntries][kEntryWords];

  SIMT static void load_value_words(const AttendArgs& a, ValueWords& words) {
    const uint32_t* packed = a.value_codec.packed + size_t(simt::block_y() / a.row_groups) * kCodewords * (D / 4);
    SIMT_UNROLL
    for (int k = 0; k < kThreadEntries; k++) {
      SIMT_UNROLL
      for (int j = 0; j < kEntryWords; j++) {
        words[k][j] = simt::load_constant(packed + (simt::thread() + k * S::kThreads) * kEntryWords + j);
      }
    }
  }

  SIMT static void fill_value_table(const ValueWords& words) {
    constexpr int kWords = kEntryWords;
    uint8_t* table = simt::shared() + S::kValueTable;
    SIMT_UNROLL
    for (int k = 0; k < kThreadEntries; k++) {
      const int i = simt::thread() + k * S::kThreads;
      const int code = i / kRowEntries, unit = i % kRowEntries / 8, g = i % 8;
      const uint32_t(&word)[kWords] = words[k];
      uint8_t* at = table + unit / S::kUnitsPerRow * S::kValuePlaneBytes + unit % S::kUnitsPerRow * S::kUnitBytes +
                    g * S::kCopies * S::kEntryBytes;
      SIMT_UNROLL
      for (int sign = 0; sign < 2; sign++) {
        uint32_t* row = reinterpret_cast<uint32_t*>(at + (code + sign * kCodewords) * S::kValueRowBytes);
        if constexpr (S::kCopies * kWords % 4 == 0) {
          SIMT_UNROLL
          for (int j = 0; j < S::kCopies * kWords; j += 4) {
            const uint32_t w0 = sign ? negate_bytes(word[0]) : word[0];
            const uint32_t w1 = sign ? negate_bytes(word[1 % kWords]) : word[1 % kWords];
            *reinterpret_cast<uint4*>(row + j) = make_uint4(w0, w1, w0, w1);
          }
        } else {
          SIMT_UNROLL
          for (int j = 0; j < S::kCopies * kWords; j++) {
            row[j] = sign ? negate_bytes(word[j % kWords]) : word[j % kWords];
          }
        }
      }
    }
  }

  SIMT static void copy_scales(const AttendArgs& a) {
    const int head = simt::block_y() / a.row_groups;
    for (int m = simt::thread(); m < MV; m += S::kThreads) {
      simt::copy_async<4>(simt::shared() + S::kScales + m * 4, a.value_codec.scale + head * MV + m);
    }
    for (int m = simt::thread(); m < MK; m += S::kThreads) {
      simt::copy_async<4>(simt::shared() + S::kKeyScales + m * 4, a.key_codec.scale + head * MK + m);
    }
  }

  /// Signed byte `i` of a word whose bytes were XORed with 0x80, without the slow conversion unit.
  SIMT static float byte_to_float(uint32_t biased, int i) {
    return simt::bits_to_float(simt::permute(biased, 0x4b000000u, 0x7440u | i)) - 8388736.0f;
  }

  /// Starts copying an item's queries to shared memory, and their factors to one of two places there: the tables are
  /// made from queries at an item's start, so the next ones may come while it is worked off; factors are used
  /// throughout.
  SIMT static void fetch_queries(const AttendArgs& a, int item, int place) {
    if (item >= Items::n_items(a)) return;
    const size_t row = Items::first_row(a, Items::stream_of(a, item));
    uint8_t* to = simt::shared() + S::kQueries;
    for (int i = simt::thread(); i < S::kRows * D / 4; i += S::kThreads) {
      simt::copy_async<16>(to + i * 16, a.queries + row * D + i * 4);
    }
    if (simt::thread() == 0) {
      simt::copy_async<16>(simt::shared() + S::kFactors + place * S::kRows * 4, a.query_factors + row);
    }
  }

  SIMT static void fill_score_table(const AttendArgs& a) {
    constexpr int W = S::kKeyWidth;
    const int head = simt::block_y() / a.row_groups;
    const float* queries = reinterpret_cast<const float*>(simt::shared() + S::kQueries);
    const uint8_t* packed = reinterpret_cast<const uint8_t*>(a.key_codec.packed) + size_t(head) * kCodewords * D;
    const int slot = simt::thread() % S::kKeySlots, first = simt::thread() / S::kKeySlots;
    SIMT_UNROLL
    for (int plane = 0; plane < S::kKeyPlanes; plane++) {
      const int subspace = plane * 32 + slot % MK;
      const float scale = reinterpret_cast<const float*>(simt::shared() + S::kKeyScales)[subspace];
      float q[S::kRows][W];
      SIMT_UNROLL
      for (int r = 0; r < S::kRows; r++) {
        SIMT_UNROLL
        for (int i = 0; i < W; i++) q[r][i] = queries[r * D + subspace * W + i] * scale;
      }
      uint8_t* at = simt::shared() + plane * S::kKeyPlaneBytes + slot * 8;
      constexpr int kStride = S::kThreads / S::kKeySlots, kEntries = kCodewords / kStride, kWords = (W + 3) / 4;
      uint32_t words[kEntries][kWords];
      SIMT_UNROLL
      for (int k = 0; k < kEntries; k++) {
        const uint8_t* word = packed + ((first + k * kStride) * MK + subspace) * W;
        if constexpr (W == 2) {
          words[k][0] = simt::load_constant(reinterpret_cast<const uint16_t*>(word)) ^ 0x8080u;
        } else {
          SIMT_UNROLL
          for (int i = 0; i < kWords; i++) {
            words[k][i] = simt::load_constant(reinterpret_cast<const uint32_t*>(word) + i) ^ 0x80808080u;
          }
        }
      }
      SIMT_UNROLL
      for (int k = 0; k < kEntries; k++) {
        const int code = first + k * kStride;
        float e[S::kRows] = {};
        SIMT_UNROLL
        for (int i = 0; i < W; i++) {
          const float w = byte_to_float(words[k][i / 4], i % 4);
          SIMT_UNROLL
          for (int r = 0; r < S::kRows; r++) e[r] += q[r][i] * w;
        }
        const uint2 entry = make_uint2(simt::pack_half2(e[0], e[1]), simt::pack_half2(e[2], e[3]));
        *reinterpret_cast<uint2*>(at + code * 256) = entry;
        if constexpr (S::kKeyExpanded) {
          *reinterpret_cast<uint2*>(at + (code + kCodewords) * 256) =
              make_uint2(entry.x ^ 0x80008000u, entry.y ^ 0x80008000u);
        }
      }
    }
  }
};

}  // namespace thimble::cuda
