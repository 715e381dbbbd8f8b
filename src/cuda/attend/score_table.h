// Decode attention: the table of codewords' products with an item's queries (shape.h).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cuda/attend/bytes.h"
#include "cuda/attend/shared.h"
#include "cuda/layout.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

template <typename S>
struct ScoreTable {
  using Shared = AttendShared<S>;
  static constexpr int D = S::kHeadDim, MK = S::kKeySubspaces;

  // The table is made in two steps, load and fill, so that other work fits between them while codewords are on their
  // way. A thread has one column of the table, that is, one subspace of each plane, and every kCodeStride-th codeword.
  static constexpr int kColumns = 32 / S::kKeyCopies, kCodeStride = S::kThreads / kColumns;
  static constexpr int kEntries = kCodewords / kCodeStride, kWords = S::kKeyWidth == 8 ? 2 : 1;
  using Words = uint32_t[S::kKeyPlanes][kEntries][kWords];

  SIMT static void load(const AttendArgs& a, Words& words) {
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
          for (int i = 0; i < kWords; i++) {
            words[plane][k][i] = simt::load_constant(reinterpret_cast<const uint32_t*>(word) + i);
          }
        }
      }
    }
  }

  /// What a reader adds to each entry of bytes. Where the table has no rows for negated codewords, an entry e stands
  /// for e + 1/2 units, so that ~e stands for the negated product.
  static constexpr float kEntryHalf = S::kWideKeys || S::kKeyExpanded ? 0 : 0.5f;

  /// Stores the products of all codewords with the 4 query rows of an item. In tables of bytes a unit is the row's
  /// greatest product / 127; Shared::factors of the row is multiplied with it.
  SIMT static void fill(const Words& words, int slot) {
    constexpr int W = S::kKeyWidth;
    const float* queries = simt::shared_at<float, offsetof(Shared, queries)>() + slot * S::kRows * D;
    const int thread = simt::thread_again(), column = thread % kColumns, first = thread / kColumns;
    float products[S::kKeyPlanes][kEntries][S::kRows];
    SIMT_UNROLL
    for (int plane = 0; plane < S::kKeyPlanes; plane++) {
      const int subspace = plane * 32 + column;
      const float scale = simt::shared_at<float, offsetof(Shared, key_scales)>()[subspace];
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
          for (int i = 0; i < S::kKeyCopies; i++) {  // the lanes of a warp store to different banks
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

private:
  /// Finds, for each query row, the factor that takes its products to the range of bytes, and divides the row's entry
  /// of Shared::factors by it. All threads of the block call it.
  SIMT static void find_units(const float (&products)[S::kKeyPlanes][kEntries][S::kRows], int slot,
                              float (&to_bytes)[S::kRows]) {
    uint32_t* greatest_of_warps =
        simt::shared_at<uint32_t, offsetof(Shared, greatest_products)>() + slot * S::kWarps * S::kRows;
    const int thread = simt::thread_again();
    SIMT_UNROLL
    for (int r = 0; r < S::kRows; r++) {
      float greatest = 0;
      SIMT_UNROLL
      for (int plane = 0; plane < S::kKeyPlanes; plane++) {
        SIMT_UNROLL
        for (int k = 0; k < kEntries; k++) greatest = simt::max_nan(greatest, fabsf(products[plane][k][r]));
      }
      const uint32_t of_warp = simt::max_of_warp(simt::float_to_bits(greatest));  // see greatest_of
      if (thread % 32 == 0) greatest_of_warps[thread / 32 * S::kRows + r] = of_warp;
    }
    simt::sync();
    SIMT_UNROLL
    for (int r = 0; r < S::kRows; r++) {
      const float greatest =
          simt::bits_to_float(simt::max_of_warp(greatest_of_warps[thread % S::kWarps * S::kRows + r]));
      to_bytes[r] = greatest == 0 ? 0.0f : 127 * simt::reciprocal_fast(greatest);
      if (thread == r)
        simt::shared_at<float, offsetof(Shared, factors)>()[slot * S::kRows + r] *= greatest * (1.0f / 127);
    }
  }
};

}  // namespace thimble::cuda
