// Decode attention: the shared memory that a thread block of each format takes. No CUDA in it, like deal.h.
#pragma once

#include <cstddef>

#include "cuda/attend/shape.h"
#include "cuda/attend/shared.h"
#include "cuda/attend/tile_shape.h"
#include "cuda/formats.h"

namespace thimble::cuda {

/// Bytes of shared memory for one item at a time, with Hopper's tables (`large`) or others'; 0 where there is no
/// kernel.
inline size_t attend_shared_bytes(bool large, int head_dim, int key_width, int value_width) {
  const auto of_size = [&]<int HeadDim>() {
    const auto of_widths = [&]<int KeyWidth, int ValueWidth>() {
      return large ? shared_bytes<AttendShape<HeadDim, KeyWidth, ValueWidth, true>>()
                   : shared_bytes<AttendShape<HeadDim, KeyWidth, ValueWidth, false>>();
    };
    return for_widths(key_width, value_width, of_widths, size_t(0));
  };
  return for_head_dim(head_dim, of_size, size_t(0));
}

/// The same for tiles.
inline size_t tile_shared_bytes(int head_dim) {
  return for_head_dim(
      head_dim, []<int HeadDim>() { return shared_bytes<TileShape<HeadDim>>(); }, size_t(0));
}

}  // namespace thimble::cuda
