// Decode attention: how many threads a format takes, and the two tables in shared memory.
//
//   keys:   the score table, made for each item. It has a row of 256 bytes for each code. An entry holds a subspace's
//           products of its codeword with the 4 query rows, as bytes, or as f16 in `wide` tables. 32 entries, for
//           subspaces or copies of them, make a plane. An `expanded` table also has rows for the negated codewords, in
//           twice the memory, so that the sign bit costs no instruction. `Direct` kernels have the codewords themselves
//           instead, which many items share (direct.h).
//   values: the codewords. The table has a row for each code and sign: units of 8 entries, for the subspaces g, g + 8,
//           ..., with `copies` of each entry, so that the 4 lanes that read one subspace read from different banks.
#pragma once

#include <cstddef>

#include "cuda/layout.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// Warps of a thread block: 16, whose threads have 128 registers each, or 8 with 255 for formats that need more.
constexpr int attend_warps(int head_dim, int key_width, int value_width) {
  return head_dim == 256 || key_width == 2 || value_width == 2 ? 8 : 16;
}

inline constexpr int kMaxBatch = 8;  // items that a thread block takes at once

/// Whether there is a kernel for many items at once: the tables of codewords fit into shared memory.
constexpr bool has_direct(int head_dim, int key_width) {
  return head_dim == 128 || (head_dim == 64 && key_width > 2);
}

/// Whether there is a kernel for two items at once: their score tables fit, being of bytes and up to 32 subspaces.
constexpr bool has_pairs(int head_dim, int key_width) {
  return key_width > 2 && head_dim / key_width <= 32;
}

/// `Large`: for devices that give a block 227 KiB (Hopper); else as little as the format allows. `Slots`: the most
/// items that a thread block takes at once, each with a share of its warps. 1, 2 where has_pairs, or kMaxBatch where
/// has_direct. `Paged`: for caches with a block table (Pages), one item at a time.
template <int HeadDim, int KeyWidth, int ValueWidth, bool Large, int Slots = 1, bool Paged = false>
struct AttendShape {
  static constexpr bool kDirect = Slots > 2;
  static constexpr bool kLarge = Large;
  static constexpr bool kPaged = Paged;
  static_assert(!Paged || Slots == 1);
  static constexpr int kSlots = Slots;
  static_assert(Slots == 1 || (Large && (kDirect ? has_direct(HeadDim, KeyWidth) : has_pairs(HeadDim, KeyWidth))));
  static constexpr int kHeadDim = HeadDim, kKeyWidth = KeyWidth, kValueWidth = ValueWidth;
  static constexpr int kRows = kRowGroup;
  static constexpr int kKeySubspaces = HeadDim / KeyWidth, kValueSubspaces = HeadDim / ValueWidth;
  static constexpr int kWarps = attend_warps(HeadDim, KeyWidth, ValueWidth);
  static constexpr int kThreads = kWarps * 32;
  static_assert(kWarps == 8 || kWarps == 16);
  // A warp transforms, finishes and so on up to kWarpRows query rows of a batch at once: row warp % 4 of every
  // kSlotStep-th slot from warp / 4 on.
  static constexpr int kSlotStep = kWarps / kRowGroup;
  static constexpr int kWarpRows = Slots > kSlotStep ? Slots / kSlotStep : 1;
  static constexpr int kKeyBlock = (kKeySubspaces + 2) * kBlockCells;
  static constexpr int kValueBlock = (kValueSubspaces + 2) * kBlockCells;

  // At 4 bits, width 2, the codec's own error is so small that products and weights of 8 bits would add to it. They
  // have 16 bits there, as on the CPU.
  static constexpr bool kWideKeys = KeyWidth == 2, kWideValues = ValueWidth == 2;

  static constexpr int kKeyPlanes = kKeySubspaces > 32 ? kKeySubspaces / 32 : 1;
  static constexpr int kKeyCopies = kKeySubspaces < 32 ? 32 / kKeySubspaces : 1;  // a bank for each lane of a warp
  static constexpr int kKeyEntryBytes = kWideKeys ? 8 : 4;                        // of 4 rows
  static constexpr bool kKeyExpanded = Large && kKeyPlanes * kKeyEntryBytes <= (HeadDim == 256 ? 8 : 16);
  static constexpr int kKeyRowBytes = 256;
  // Two planes of bytes lie side by side in a row, or the planes of two items. Planes of f16 lie one after the other.
  static constexpr int kKeyPlaneBytes = kWideKeys ? (kKeyExpanded ? 256 : 128) * 256 : 128;
  static constexpr int kKeyTableBytes =
      (kDirect || kKeyExpanded ? 256 : 128) * 256 * (kDirect || !kWideKeys ? 1 : kKeyPlanes);

  static constexpr int kCopies = Large ? (HeadDim == 64    ? 4
                                          : HeadDim == 128 ? (KeyWidth == 2 && !kDirect ? 2 : 4)
                                                           : (KeyWidth == 2 ? 1 : 2))
                                       : (HeadDim == 64 ? 2 : 1);
  static constexpr int kEntryBytes = ValueWidth == 8 ? 8 : 4;  // width 2: two subspaces, 8 apart, to an entry
  static constexpr int kUnits = HeadDim / (kEntryBytes * 8);
  static constexpr int kUnitBytes = kEntryBytes * 8 * kCopies;
  static constexpr int kValueRowBytes = kUnits * kUnitBytes <= 128 ? 128 : 256;
  static constexpr int kUnitsPerRow = kValueRowBytes / kUnitBytes;
  static constexpr int kValuePlaneBytes = 256 * kValueRowBytes;
  static constexpr int kValueTableBytes = (kUnits + kUnitsPerRow - 1) / kUnitsPerRow * kValuePlaneBytes;

  /// Whether masks, hidden cells' bits and scales come to registers by way of shared memory, see shared.h.
  static constexpr bool kStaged = Large;
  static constexpr bool kStagesScales = kStaged && (kWarps == 16 || kDirect);  // where registers are scarce

  /// Whether codes are loaded a whole block ahead, as there are registers for it. Else values are loaded while the same
  /// block's keys are looked up, and keys while the values before them are; they are in L2 by then.
  static constexpr bool kDeep = kWarps == 8 && kKeySubspaces + kValueSubspaces <= 128;

  static constexpr int kPartialFloats = kRows * HeadDim + 2 * kRows;  // sums, maxima, weights

  static_assert(kKeySubspaces % 8 == 0 && kValueSubspaces % 8 == 0);
};

}  // namespace thimble::cuda
