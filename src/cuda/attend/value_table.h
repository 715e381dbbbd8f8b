// Decode attention: the table of the values' codewords in shared memory (shape.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/attend/bytes.h"
#include "cuda/attend/shared.h"
#include "cuda/layout.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

template <typename S>
struct ValueTable {
  static constexpr int D = S::kHeadDim;
  using Shared = AttendShared<S>;

  // The table is made in two steps, load and fill, so that other loads can start between them while the codewords are
  // on their way.
  static constexpr int kEntryWords = S::kEntryBytes / 4, kRowEntries = S::kUnits * 8;
  static constexpr int kThreadEntries = kCodewords * kRowEntries / S::kThreads;
  static_assert(kCodewords * kRowEntries % S::kThreads == 0);
  using Words = uint32_t[kThreadEntries][kEntryWords];

  SIMT static void load(const AttendArgs& a, Words& words) {
    const uint32_t* packed = a.value_codec.packed + size_t(simt::block_y()) * kCodewords * (D / 4);
    SIMT_UNROLL
    for (int k = 0; k < kThreadEntries; k++) {
      SIMT_UNROLL
      for (int j = 0; j < kEntryWords; j++) {
        words[k][j] = simt::load_constant(packed + (simt::thread() + k * S::kThreads) * kEntryWords + j);
      }
    }
  }

  SIMT static void fill(const Words& words) {
    constexpr int kWords = kEntryWords;
    uint8_t* table = simt::shared() + offsetof(Shared, value_table);
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
          for (int j = 0; j < kVectors; j++) {  // 8 lanes store to different banks
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
};

}  // namespace thimble::cuda
