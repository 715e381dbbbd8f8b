// How decode attention uses a multiprocessor, by format: threads, and the two tables in shared memory.
//
//   keys:   score table, made anew for each item. A row for each code, 256 bytes: slots of the 4 query rows' products
//           with that codeword, in bytes, or `wide`, in f16. 32 slots, for subspaces or copies of them, make a plane.
//           `expanded`: rows for the negated codewords too, at twice the memory, so that the sign bit costs no
//           instruction. `Direct`: the codewords themselves, which many items share (direct.h).
//   values: codewords. A row for each code and sign: units of 8 entries (subspaces g, g + 8, ...), `copies` of each, so
//           that the 4 lanes that look into one subspace find it in banks of their own.
#pragma once

#include <cstddef>

#include "cuda/layout.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// Warps of a block. Sixteen leave a thread 128 registers; formats with much to hold get eight with 255.
constexpr int attend_warps(int head_dim, int key_width, int value_width) {
  return head_dim == 256 || key_width == 2 || value_width == 2 ? 8 : 16;
}

inline constexpr int kMaxBatch = 8;  // items that a thread block takes at once

/// Whether there is a kernel for many items at once: formats whose codeword tables fit.
constexpr bool has_direct(int head_dim, int key_width) {
  return head_dim == 128 || (head_dim == 64 && key_width > 2);
}

/// Whether score tables of two items fit: bytes of up to 32 subspaces.
constexpr bool has_pairs(int head_dim, int key_width) {
  return key_width > 2 && head_dim / key_width <= 32;
}

/// `Large`: for devices that give a block 227 KiB (Hopper); else as little as the format allows. `Slots`: the most
/// items that a thread block takes at once, each with a share of its warps. 1, 2 where has_pairs, or kMaxBatch where
/// has_direct.
template <int HeadDim, int KeyWidth, int ValueWidth, bool Large, int Slots = 1>
struct AttendShape {
  static constexpr bool kDirect = Slots > 2;
  static constexpr int kSlots = Slots;
  static_assert(Slots == 1 || (Large && (kDirect ? has_direct(HeadDim, KeyWidth) : has_pairs(HeadDim, KeyWidth))));
  static constexpr int kHeadDim = HeadDim, kKeyWidth = KeyWidth, kValueWidth = ValueWidth;
  static constexpr int kRows = kRowGroup;
  static constexpr int kKeySubspaces = HeadDim / KeyWidth, kValueSubspaces = HeadDim / ValueWidth;
  static constexpr int kWarps = attend_warps(HeadDim, KeyWidth, ValueWidth);
  static constexpr int kThreads = kWarps * 32;
  static_assert(kWarps == 8 || kWarps == 16);
  // Query rows of a batch that a warp transforms, finishes and so on, all at once: of row warp % 4 those of every
  // kSlotStep-th slot from warp / 4 on.
  static constexpr int kSlotStep = kWarps / kRowGroup;
  static constexpr int kWarpRows = Slots > kSlotStep ? Slots / kSlotStep : 1;
  static constexpr int kKeyBlock = (kKeySubspaces + 2) * kBlockCells;
  static constexpr int kValueBlock = (kValueSubspaces + 2) * kBlockCells;

  // Pairs of numbers are the format of 4 bits, whose own error is so small that products and weights of 8 bits would
  // add to it (as on the CPU).
  static constexpr bool kWideKeys = KeyWidth == 2, kWideValues = ValueWidth == 2;

  static constexpr int kKeyPlanes = kKeySubspaces > 32 ? kKeySubspaces / 32 : 1;
  static constexpr int kKeyCopies = kKeySubspaces < 32 ? 32 / kKeySubspaces : 1;  // a bank for each lane of a warp
  static constexpr int kKeyEntryBytes = kWideKeys ? 8 : 4;                        // of 4 rows
  static constexpr bool kKeyExpanded = Large && kKeyPlanes * kKeyEntryBytes <= (HeadDim == 256 ? 8 : 16);
  static constexpr int kKeyRowBytes = 256;
  // Two planes of bytes lie side by side in the rows, or two items' only ones; those of f16 one after the other.
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

  // Combining takes the place of the keys' table once that is used up; what follows the tables has its own place.
  static constexpr int kRowBytes = kSlots * kRows * HeadDim * 4;  // of all query rows, f32
  static constexpr int kSumStride = HeadDim + 8;                  // floats; keeps warps' rows in different banks
  static constexpr int kSums = 0;                                 // float [kWarps][4][kSumStride]
  static constexpr int kSumsBytes = kWarps * kRows * kSumStride * 4;
  static constexpr int kStates = kSums + kSumsBytes;                   // float [kWarps][8]: maxima, then weights
  static constexpr int kAfterSums = kStates + kWarps * 2 * kRows * 4;  // see kSplitQueries, kCodedOutputs
  static constexpr bool kOwnOutputs = Large && kSlots == 1;
  static constexpr int kCombineBytes = kAfterSums + (kOwnOutputs ? kRowBytes : 2 * kRowBytes);
  static constexpr int kValueTable = kKeyTableBytes > kCombineBytes ? kKeyTableBytes
                                                                    : (kCombineBytes + 1023) / 1024 * 1024;
  static constexpr int kQueries = kValueTable + kValueTableBytes;   // float [kSlots][4][HeadDim], see transform_queries
  static constexpr int kScales = kQueries + kRowBytes;              // float [kValueSubspaces]
  static constexpr int kKeyScales = kScales + kValueSubspaces * 4;  // float [kKeySubspaces]
  static constexpr int kAfter = kKeyScales + kKeySubspaces * 4;     // AttendKernel::Blocks [kWarps]
  static constexpr int kFactors = kAfter + kWarps * 32;             // float [kSlots][4], of the transformed queries
  static constexpr int kOffsets = kFactors + kSlots * kRows * 4;    // the same, what coded cells' logits lack
  static constexpr int kWeights = kOffsets + kSlots * kRows * 4;    // the same, of coded cells
  static constexpr int kSlopes = kWeights + kSlots * kRows * 4;     // float [4], on the mask, in units of log2 e
  static constexpr int kTops = kSlopes + kRows * 4;                 // float [kSlots][kWarps][4], of score tables
  static constexpr int kLast = kTops + (kDirect ? 0 : kSlots * kWarps * kRows * 4);  // int
  // What a block of 64 cells needs of the mask, of the hidden cells' bits and of scales (keys', then values', f16) on
  // the way from memory, where there is room for that: uint4 [kWarps][32], uint32_t [kWarps][32], uint4 [kWarps][2][8].
  static constexpr bool kStaged = Large;
  static constexpr int kMasks = kLast + 16;
  static constexpr int kHidden = kMasks + (kStaged ? kWarps * 32 * 16 : 0);
  static constexpr bool kStagesScales = kStaged && (kWarps == 16 || kDirect);  // where registers are scarce
  static constexpr int kStagedScales = kHidden + (kStaged ? kWarps * 32 * 4 : 0);
  static constexpr int kEnd = kStagedScales + (kStagesScales ? kWarps * 256 : 0);
  // What is written out, float [kSlots][4][HeadDim] each: of coded cells, and of exact rows. Where memory is short,
  // behind the sums: then the next table must wait for its readers. Many items' go where their queries were.
  static constexpr int kCodedOutputs = kDirect ? kQueries : kOwnOutputs ? kEnd : kAfterSums;
  static constexpr int kExactOutputs = kDirect ? kAfterSums : kCodedOutputs + kRowBytes;
  static constexpr size_t kSharedBytes = kEnd + (kOwnOutputs ? 2 * kRowBytes : 0);
  // f16 [kSlots][2][4][HeadDim], while exact rows are attended to: the queries, see exact.h.
  static constexpr int kSplitQueries = kAfterSums;
  static_assert(kAfter % 32 == 0 && kFactors % 16 == 0 && kMasks % 16 == 0 && kCodedOutputs % 16 == 0);
  static_assert(Large || HeadDim == 256 || kSharedBytes <= 99 * 1024);

  /// Codes are fetched a whole block ahead where registers allow it; else values while the same block's keys are looked
  /// up, and keys while the values before them are. They are in L2 by then.
  static constexpr bool kDeep = kWarps == 8 && kKeySubspaces + kValueSubspaces <= 128;

  static constexpr int kPartialFloats = kRows * HeadDim + 2 * kRows;  // sums, maxima, weights

  static_assert(kKeySubspaces % 8 == 0 && kValueSubspaces % 8 == 0 && kSharedBytes <= 227 * 1024);
};

}  // namespace thimble::cuda
