// Decode attention: how work is dealt out, and the tables in shared memory (attend_shape.h).
#pragma once

#include "cuda/attend_shape.h"
#include "cuda/hadamard.h"
#include "cuda/simt.h"

namespace thimble::cuda {

/// Items are splits of a stream's cells. A thread block serves one KV head and one group of 4 query rows, and takes
/// every blocks_x-th item.
template <typename S>
struct AttendItems {
  static constexpr int D = S::kHeadDim;

  /// What query row r of this thread block's 4 belongs to. Rows that only pad the group are of tokens that are not
  /// there.
  struct QueryRow {
    int token, head;
  };
  SIMT static QueryRow query_row(const AttendArgs& a, int r) {
    const int row = simt::block_z() * S::kRows + r, token = int(uint32_t(row) * a.group_inverse >> 16);
    return {token, simt::block_y() * a.group + row - token * a.group};
  }
  /// The thread block's number among those of a split.
  SIMT static int pair(const AttendArgs& a) { return simt::block_y() * a.row_groups + simt::block_z(); }

  SIMT static int stream_of(const AttendArgs& a, int item) {
    return a.n_splits == 1 ? item : int(simt::multiply_high(uint32_t(item), a.splits_inverse));
  }
  /// A first split that has exact rows, too, takes fewer blocks.
  SIMT static int block_begin(const AttendArgs& a, int split) {
    const int larger = split < a.n_larger_splits ? split : a.n_larger_splits;
    const int at = split * a.split_blocks + larger - a.exact_blocks;
    return at > 0 ? at : 0;
  }
  SIMT static int n_items(const AttendArgs& a) { return a.n_streams * a.n_splits; }
};

template <typename S>
struct AttendTables {
  using Items = AttendItems<S>;
  static constexpr int D = S::kHeadDim, MK = S::kKeySubspaces, MV = S::kValueSubspaces;
  static constexpr float kLog2e = 1.44269504f;

  SIMT static uint32_t negate_bytes(uint32_t x) {  // -128 does not occur
    return ((~x & 0x7f7f7f7f) + 0x01010101) ^ (~x & 0x80808080);
  }

  // The value table, in two steps: while the codewords are on their way, other things can be asked for.
  static constexpr int kEntryWords = S::kEntryBytes / 4, kRowEntries = S::kUnits * 8;
  static constexpr int kThreadEntries = kCodewords * kRowEntries / S::kThreads;
  static_assert(kCodewords * kRowEntries % S::kThreads == 0);
  using ValueWords = uint32_t[kThreadEntries][kEntryWords];

  SIMT static void load_value_words(const AttendArgs& a, ValueWords& words) {
    const uint32_t* packed = a.value_codec.packed + size_t(simt::block_y()) * kCodewords * (D / 4);
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
    static_assert(MK <= S::kThreads && MV <= S::kThreads);
    const int head = simt::block_y(), m = simt::thread();
    if (m < MV) simt::copy_async<4>(simt::shared() + S::kScales + m * 4, a.value_codec.scale + head * MV + m);
    if (m < MK) simt::copy_async<4>(simt::shared() + S::kKeyScales + m * 4, a.key_codec.scale + head * MK + m);
  }

  /// Signed byte `i` of a word whose bytes were XORed with 0x80, without the slow conversion unit.
  SIMT static float byte_to_float(uint32_t biased, int i) {
    return simt::bits_to_float(simt::permute(biased, 0x4b000000u, 0x7440u | i)) - 8388736.0f;
  }

  /// Starts copying an item's queries to shared memory, as the model wrote them.
  SIMT static void fetch_queries(const AttendArgs& a, int item) {
    if (item >= Items::n_items(a)) return;
    static_assert(S::kRows * D / 4 <= S::kThreads);
    const int i = simt::thread_again();
    if (i >= S::kRows * D / 4) return;
    const auto row = Items::query_row(a, i / (D / 4));
    uint4* to = reinterpret_cast<uint4*>(simt::shared() + S::kQueries) + i;
    if (row.token < a.n_tokens) {
      simt::copy_async<16>(to, a.queries + Items::stream_of(a, item) * a.query_stream_stride +
                                   row.token * a.query_token_stride + row.head * a.query_head_stride + i % (D / 4) * 4);
    } else {
      *to = make_uint4(0, 0, 0, 0);
    }
  }

  /// The 4 query rows in shared memory times this head's matrix of [n_kv_heads][D][D]. All threads share each
  /// component's sum, so that few loads wait for one another: component o's is the sum of o, o + 4 D, ... of kParts
  /// parts, at kSums when this returns.
  static constexpr int kParts = S::kThreads / D;
  SIMT static float* multiply_rows(const float* rows, const float* matrices) {
    constexpr int kTerms = D / kParts;
    static_assert(kParts >= 1 && kParts * S::kRows * D * 4 <= S::kSumsBytes);
    const float* matrix = matrices + size_t(simt::block_y()) * D * D;
    float* partial = reinterpret_cast<float*>(simt::shared() + S::kSums);
    const int thread = simt::thread_again(), d = thread % D, part = thread / D;
    float sum[S::kRows] = {};
    SIMT_UNROLL_BY(16)
    for (int k = 0; k < kTerms; k++) {
      const int i = part * kTerms + k;
      const float m = simt::load_constant(matrix + i * D + d);
      SIMT_UNROLL
      for (int r = 0; r < S::kRows; r++) sum[r] += rows[r * D + i] * m;
    }
    SIMT_UNROLL
    for (int r = 0; r < S::kRows; r++) partial[(part * S::kRows + r) * D + d] = sum[r];
    simt::sync();
    return partial;
  }

  /// Transforms the item's queries where they are. They become unit in their greatest component, so that score tables
  /// fit f16 whatever the queries' size; the factors make up for that. Codes tell a key less the mean, so logits lack
  /// the query's product with it: the same for every cell, it is added to their maximum.
  SIMT static void transform_queries(const AttendArgs& a) {
    uint8_t* shared = simt::shared();
    float* queries = reinterpret_cast<float*>(shared + S::kQueries);
    const float* partial = a.key_codec.undo ? multiply_rows(queries, a.key_codec.undo) : nullptr;
    const int thread = simt::thread_again(), r = thread / 32, lane = thread % 32;
    if (r < S::kRows) {
      constexpr int N = D / 32;
      float x[N] = {}, top = 0;
      SIMT_UNROLL
      for (int i = 0; i < N; i++) {
        if (a.key_codec.undo) {
          SIMT_UNROLL
          for (int part = 0; part < kParts; part++) x[i] += partial[(part * S::kRows + r) * D + lane * N + i];
        } else {
          x[i] = queries[r * D + lane * N + i];
        }
      }
      if (!a.key_codec.undo) hadamard_warp<D, true>(x, lane);
      SIMT_UNROLL
      for (int i = 0; i < N; i++) top = simt::max_nan(top, fabsf(x[i]));
      SIMT_UNROLL
      for (int mask = 1; mask < 32; mask *= 2) top = simt::max_nan(top, simt::shuffle_xor(top, mask));
      float along_mean = 0;
      if (a.key_codec.mean && a.softcap == 0) {
        const float* mean = a.key_codec.mean + size_t(simt::block_y()) * D;
        for (int d = lane; d < D; d += 32) along_mean += queries[r * D + d] * simt::load_constant(mean + d);
        SIMT_UNROLL
        for (int mask = 1; mask < 32; mask *= 2) along_mean += simt::shuffle_xor(along_mean, mask);
      }
      simt::sync_warp();
      const float inverse = top == 0 ? 0.0f : 1 / top;
      SIMT_UNROLL
      for (int i = 0; i < N; i++) queries[r * D + lane * N + i] = x[i] * inverse;
      if (lane == 0) {
        reinterpret_cast<float*>(shared + S::kFactors)[r] = top * a.scale * kLog2e;
        reinterpret_cast<float*>(shared + S::kOffsets)[r] = along_mean * a.scale * kLog2e;
      }
    }
    simt::sync();
  }

  SIMT static void fill_score_table(const AttendArgs& a) {
    constexpr int W = S::kKeyWidth;
    const int head = simt::block_y();
    const float* queries = reinterpret_cast<const float*>(simt::shared() + S::kQueries);
    const uint8_t* packed = reinterpret_cast<const uint8_t*>(a.key_codec.packed) + size_t(head) * kCodewords * D;
    const int thread = simt::thread_again(), slot = thread % S::kKeySlots, first = thread / S::kKeySlots;
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
