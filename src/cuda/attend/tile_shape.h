// Decode attention over tiles, for formats that have no kernel with tables (shape.h): subspaces of several widths in
// one vector, keys and values of rates that do not go together, or a device with too little shared memory. Shared
// memory holds the codewords of keys and of values, and a warp decodes what it attends to.
#pragma once

#include <cstddef>

#include "cuda/types.h"

namespace thimble::cuda {

constexpr int tile_warps(int head_dim) {
  return head_dim == 256 ? 8 : 16;
}

/// The names are those of AttendShape, so that all but the loop over cells is shared.
template <int HeadDim, bool Words = true>
struct TileShape {
  static constexpr bool kWords = Words;  // whether codewords lie in shared memory; else they are read through L1
  static constexpr bool kDirect = false, kLarge = false, kPaged = false, kStaged = false, kStagesScales = false;
  static constexpr int kSlots = 1, kHeadDim = HeadDim, kRows = kRowGroup;
  static constexpr int kWarps = tile_warps(HeadDim), kThreads = kWarps * 32;
  static constexpr int kSlotStep = kWarps / kRowGroup, kWarpRows = 1;
  static constexpr int kKeySubspaces = HeadDim, kValueSubspaces = HeadDim;  // codewords' scales are by component here
  // CodecTables::packed; shared.h wants some bytes in any case.
  static constexpr int kKeyTableBytes = Words ? 128 * HeadDim : 1024, kValueTableBytes = kKeyTableBytes;
  static constexpr int kPartialFloats = kRows * HeadDim + 2 * kRows;
};

}  // namespace thimble::cuda
