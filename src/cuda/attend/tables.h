// Decode attention: how work is dealt out, and the tables in shared memory (shape.h).
#pragma once

#include "cuda/attend/parts.h"
#include "cuda/encode/hadamard.h"
#include "cuda/simt/simt.h"

namespace thimble::cuda {

/// Items are splits of a stream's cells. A thread block serves one KV head and one group of 4 query rows, and takes
/// every blocks_x-th batch of items. The items of a batch have slots in shared memory, and each its share of the warps.
template <typename S>
struct AttendItems {
  static constexpr int D = S::kHeadDim;

  SIMT static int batch_shift(const AttendArgs& a) { return S::kSlots > 1 ? a.batch_shift : 0; }
  SIMT static int n_batches(const AttendArgs& a) { return (n_items(a) + (1 << batch_shift(a)) - 1) >> batch_shift(a); }
  /// Of a batch.
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
          constexpr int kVectors = S::kCopies * kWords / 4;
          const uint32_t w0 = sign ? negate_bytes(word[0]) : word[0];
          const uint32_t w1 = sign ? negate_bytes(word[1 % kWords]) : word[1 % kWords];
          SIMT_UNROLL
          for (int j = 0; j < kVectors; j++) {  // 8 lanes, each in banks of its own
            *reinterpret_cast<uint4*>(row + (j + g * kVectors / 8) % kVectors * 4) = make_uint4(w0, w1, w0, w1);
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

  /// Starts copying a batch's queries to shared memory, as the model wrote them: each row by the warp that transforms
  /// it.
  SIMT static void fetch_queries(const AttendArgs& a, int batch) {
    if (batch >= Items::n_batches(a)) return;
    const int thread = simt::thread_again(), warp = thread / 32, lane = thread % 32, n_slots = Items::n_slots(a, batch);
    const int slot = warp / S::kRows;
    const auto row = Items::query_row(a, warp % S::kRows);
    const bool is_there = row.token < a.n_tokens;
    const float* from = a.queries + Items::stream_of(a, Items::first_item(a, batch) + slot) * a.query_stream_stride +
                        row.token * a.query_token_stride + row.head * a.query_head_stride + lane * 4;
    uint8_t* to = simt::shared() + S::kQueries + (warp * D + lane * 4) * 4;
    SIMT_UNROLL
    for (int k = 0; k < S::kWarpRows; k++) {
      if (slot + k * S::kSlotStep >= n_slots) break;
      SIMT_UNROLL
      for (int d = 0; d < D; d += 128) {
        if (lane * 4 + d >= D) continue;
        if (is_there) {
          simt::copy_async<16>(to + d * 4, from + d);
        } else {
          *reinterpret_cast<uint4*>(to + d * 4) = make_uint4(0, 0, 0, 0);
        }
      }
      from += S::kSlotStep * a.query_stream_stride;
      to += S::kSlotStep * S::kRows * D * 4;
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

  /// Transforms a batch's queries, and hands each row to put(slot, r, x, lane): lane has the components from x's size *
  /// lane on. `put` says what their greatest is to become and returns what it was; score tables and codewords' products
  /// have a range of their own, and the factors make up for that. Codes tell a key less the mean, so logits lack the
  /// query's product with it: the same for every cell, it is added to their maximum. A row is free for `put` to write
  /// to; that all are done, a barrier has to tell.
  template <typename Put>
  SIMT static void transform_queries(const AttendArgs& a, int n_slots, Put put) {
    const int thread = simt::thread_again(), warp = thread / 32, lane = thread % 32, r = warp % S::kRows;
    if (a.key_codec.undo) {
      SIMT_NO_UNROLL
      for (int slot = 0; slot < n_slots; slot++) {
        const float* partial = multiply_rows(query_rows(slot, 0), a.key_codec.undo);
        if (warp < S::kRows) {
          float x[1][kLaneComponents] = {};
          SIMT_UNROLL
          for (int i = 0; i < kLaneComponents; i++) {
            SIMT_UNROLL
            for (int part = 0; part < kParts; part++) {
              x[0][i] += partial[(part * S::kRows + r) * D + lane * kLaneComponents + i];
            }
          }
          put_rows(a, slot, r, lane, x, put);
        }
        if constexpr (S::kSlots > 1) simt::sync();
      }
    } else if (warp / S::kRows < n_slots) {
      float x[S::kWarpRows][kLaneComponents];
      SIMT_UNROLL
      for (int k = 0; k < S::kWarpRows; k++) {
        read_floats(query_rows(warp / S::kRows + k * S::kSlotStep, r) + lane * kLaneComponents, x[k]);
      }
      hadamard_warp<D>(x, lane);
      put_rows(a, warp / S::kRows, r, lane, x, put);
    }
  }

  /// A row's greatest component, in all lanes.
  template <int N>
  SIMT static float top_of(const float (&x)[N]) {
    float top = 0;
    SIMT_UNROLL
    for (int i = 0; i < N; i++) top = simt::max_nan(top, fabsf(x[i]));
    // Of floats that are not negative, bits have the same order; a NaN's are the greatest.
    return simt::bits_to_float(simt::max_of_warp(simt::float_to_bits(top)));
  }

  /// A batch's queries, where they are: unit in their greatest component, so that score tables fit f16.
  SIMT static void transform_queries(const AttendArgs& a, int n_slots) {
    transform_queries(a, n_slots, [&](int slot, int r, const float(&x)[D / 32], int lane) {
      float* query = reinterpret_cast<float*>(simt::shared() + S::kQueries) + (slot * S::kRows + r) * D;
      const float top = top_of(x), inverse = top == 0 ? 0.0f : simt::reciprocal_fast(top);
      SIMT_UNROLL
      for (int i = 0; i < D / 32; i++) query[lane * (D / 32) + i] = x[i] * inverse;
      return top;
    });
    simt::sync();
  }

  // Score tables, in two steps as well. A thread has one column, and with it a subspace of each plane, and every
  // kCodeStride-th codeword.
  static constexpr int kColumns = 32 / S::kKeyCopies, kCodeStride = S::kThreads / kColumns;
  static constexpr int kEntries = kCodewords / kCodeStride, kKeyWords = S::kKeyWidth == 8 ? 2 : 1;
  using KeyWords = uint32_t[S::kKeyPlanes][kEntries][kKeyWords];

  SIMT static void load_key_words(const AttendArgs& a, KeyWords& words) {
    constexpr int W = S::kKeyWidth;
    const uint8_t* packed =
        reinterpret_cast<const uint8_t*>(a.key_codec.packed) + size_t(simt::block_y()) * kCodewords * D;
    const int thread = simt::thread_again(), column = thread % kColumns, first = thread / kColumns;
    SIMT_UNROLL
    for (int plane = 0; plane < S::kKeyPlanes; plane++) {
      SIMT_UNROLL
      for (int k = 0; k < kEntries; k++) {
        const uint8_t* word = packed + ((first + k * kCodeStride) * MK + plane * 32 + column) * W;
        if constexpr (W == 2) {
          words[plane][k][0] = simt::load_constant(reinterpret_cast<const uint16_t*>(word));
        } else {
          SIMT_UNROLL
          for (int i = 0; i < kKeyWords; i++) {
            words[plane][k][i] = simt::load_constant(reinterpret_cast<const uint32_t*>(word) + i);
          }
        }
      }
    }
  }

  /// What is missing from an entry of bytes. Where the table has no rows for negated codewords, an entry e stands for
  /// e + 1/2 units, so that ~e is the negated one.
  static constexpr float kEntryHalf = S::kWideKeys || S::kKeyExpanded ? 0 : 0.5f;

  /// Products of all codewords with the 4 query rows of an item. A byte's unit is the row's greatest product / 127, and
  /// the row's factor makes up for it.
  SIMT static void fill_score_table(const KeyWords& words, int slot) {
    constexpr int W = S::kKeyWidth;
    const float* queries = reinterpret_cast<const float*>(simt::shared() + S::kQueries) + slot * S::kRows * D;
    const int thread = simt::thread_again(), column = thread % kColumns, first = thread / kColumns;
    float products[S::kKeyPlanes][kEntries][S::kRows];
    SIMT_UNROLL
    for (int plane = 0; plane < S::kKeyPlanes; plane++) {
      const int subspace = plane * 32 + column;
      const float scale = reinterpret_cast<const float*>(simt::shared() + S::kKeyScales)[subspace];
      float q[S::kRows][W];
      SIMT_UNROLL
      for (int r = 0; r < S::kRows; r++) {
        SIMT_UNROLL
        for (int i = 0; i < W; i++) q[r][i] = queries[r * D + subspace * W + i] * scale;
      }
      SIMT_UNROLL
      for (int k = 0; k < kEntries; k++) {
        float(&e)[S::kRows] = products[plane][k];
        SIMT_UNROLL
        for (int r = 0; r < S::kRows; r++) e[r] = 0;
        SIMT_UNROLL
        for (int i = 0; i < W; i++) {
          const float w = byte_to_float(words[plane][k][i / 4] ^ 0x80808080u, i % 4);
          SIMT_UNROLL
          for (int r = 0; r < S::kRows; r++) e[r] += q[r][i] * w;
        }
        if constexpr (S::kWideKeys) {
          const uint2 entry = make_uint2(simt::pack_half2(e[0], e[1]), simt::pack_half2(e[2], e[3]));
          uint8_t* at =
              simt::shared() + plane * S::kKeyPlaneBytes + (first + k * kCodeStride) * S::kKeyRowBytes + column * 8;
          *reinterpret_cast<uint2*>(at) = entry;
          if constexpr (S::kKeyExpanded) {
            *reinterpret_cast<uint2*>(at + kCodewords * S::kKeyRowBytes) =
                make_uint2(entry.x ^ 0x80008000u, entry.y ^ 0x80008000u);
          }
        }
      }
    }
    if constexpr (!S::kWideKeys) {
      float to_bytes[S::kRows];
      find_units(products, slot, to_bytes);
      SIMT_UNROLL
      for (int plane = 0; plane < S::kKeyPlanes; plane++) {
        SIMT_UNROLL
        for (int k = 0; k < kEntries; k++) {
          uint32_t bits[S::kRows];  // of 2^15 + 128 + x: the second byte is x rounded down, plus 128
          SIMT_UNROLL
          for (int r = 0; r < S::kRows; r++) {
            bits[r] = simt::float_to_bits(products[plane][k][r] * to_bytes[r] + (32896.5f - kEntryHalf));
          }
          const uint32_t entry = second_bytes(bits) ^ 0x80808080u;
          SIMT_UNROLL
          for (int i = 0; i < S::kKeyCopies; i++) {  // lanes of a warp, each in a bank of its own
            const int copy = (i + thread % 32 / kColumns) % S::kKeyCopies;
            uint32_t* at = reinterpret_cast<uint32_t*>(simt::shared() + (slot + plane) * S::kKeyPlaneBytes +
                                                       (first + k * kCodeStride) * S::kKeyRowBytes) +
                           copy * kColumns + column;
            *at = entry;
            if constexpr (S::kKeyExpanded) at[kCodewords * S::kKeyRowBytes / 4] = negate_bytes(entry);
          }
        }
      }
    }
  }

  /// The second byte of each of 4 words.
  SIMT static uint32_t second_bytes(const uint32_t (&x)[4]) {
    return simt::permute(simt::permute(x[0], x[1], 0x5151), simt::permute(x[2], x[3], 0x5151), 0x5410);
  }

private:
  static constexpr int kLaneComponents = D / 32;

  SIMT static float* query_rows(int slot, int r) {
    return reinterpret_cast<float*>(simt::shared() + S::kQueries) + (slot * S::kRows + r) * D;
  }

  /// Hands transformed rows to `put`: row r of every kSlotStep-th slot from `slot` on.
  template <int Rows, typename Put>
  SIMT static void put_rows(const AttendArgs& a, int slot, int r, int lane, const float (&x)[Rows][kLaneComponents],
                            Put put) {
    float along_mean[Rows] = {};
    if (a.key_codec.mean && a.softcap == 0) {
      const float* mean = a.key_codec.mean + size_t(simt::block_y()) * D;
      SIMT_UNROLL
      for (int k = 0; k < Rows; k++) {
        const float* query = query_rows(slot + k * S::kSlotStep, r);
        for (int d = lane; d < D; d += 32) along_mean[k] += query[d] * simt::load_constant(mean + d);
        SIMT_UNROLL
        for (int mask = 1; mask < 32; mask *= 2) along_mean[k] += simt::shuffle_xor(along_mean[k], mask);
      }
    }
    simt::sync_warp();
    SIMT_UNROLL
    for (int k = 0; k < Rows; k++) {
      const int at = slot + k * S::kSlotStep;  // without an item from n_slots on: nobody looks at what is put there
      const float top = put(at, r, x[k], lane);
      if (lane != 0) continue;
      reinterpret_cast<float*>(simt::shared() + S::kFactors)[at * S::kRows + r] = top * a.scale * kLog2e;
      reinterpret_cast<float*>(simt::shared() + S::kOffsets)[at * S::kRows + r] = along_mean[k] * a.scale * kLog2e;
    }
  }

  /// What takes a block's products to the range of bytes, row by row. Row factors are divided by it.
  SIMT static void find_units(const float (&products)[S::kKeyPlanes][kEntries][S::kRows], int slot,
                              float (&to_bytes)[S::kRows]) {
    uint32_t* tops = reinterpret_cast<uint32_t*>(simt::shared() + S::kTops) + slot * S::kWarps * S::kRows;
    const int thread = simt::thread_again();
    SIMT_UNROLL
    for (int r = 0; r < S::kRows; r++) {
      float top = 0;
      SIMT_UNROLL
      for (int plane = 0; plane < S::kKeyPlanes; plane++) {
        SIMT_UNROLL
        for (int k = 0; k < kEntries; k++) top = simt::max_nan(top, fabsf(products[plane][k][r]));
      }
      const uint32_t of_warp = simt::max_of_warp(simt::float_to_bits(top));  // see top_of
      if (thread % 32 == 0) tops[thread / 32 * S::kRows + r] = of_warp;
    }
    simt::sync();
    SIMT_UNROLL
    for (int r = 0; r < S::kRows; r++) {
      const float top = simt::bits_to_float(simt::max_of_warp(tops[thread % S::kWarps * S::kRows + r]));
      to_bytes[r] = top == 0 ? 0.0f : 127 * simt::reciprocal_fast(top);
      if (thread == r)
        reinterpret_cast<float*>(simt::shared() + S::kFactors)[slot * S::kRows + r] *= top * (1.0f / 127);
    }
  }
};

}  // namespace thimble::cuda
