// Decode attention: the shared memory that a thread block of each format takes, and so which kernels a device has for
// it. No CUDA in it, like deal.h.
#pragma once

#include <cstddef>

#include "cuda/attend/shape.h"
#include "cuda/attend/shared.h"
#include "cuda/attend/tile_shape.h"
#include "cuda/formats.h"
#include "cuda/layout.h"

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

/// The same for tiles, with codewords in shared memory or without.
inline size_t tile_shared_bytes(int head_dim, bool words) {
  const auto of_size = [&]<int HeadDim>() {
    return words ? shared_bytes<TileShape<HeadDim, true>>() : shared_bytes<TileShape<HeadDim, false>>();
  };
  return for_head_dim(head_dim, of_size, size_t(0));
}

/// What of a device decides which kernels it takes.
struct Card {
  int capability = 0;       // 75, 80, 86, 89, 90, 120
  size_t shared_bytes = 0;  // the most that a thread block may have
};

/// Whether a device takes the tables that use all of Hopper's shared memory.
inline bool has_large_tables(const Card& card) {
  return card.capability >= 90 && card.shared_bytes >= 227 * 1024;
}

/// Whether a device has kernels with tables (shape.h) for keys and values of these widths; `scores`: for the scores of
/// all cells as well.
inline bool tables_fit(const Card& card, int head_dim, int key_width, int value_width, bool scores) {
  const auto fits = [&](int values) {
    const size_t bytes = attend_shared_bytes(has_large_tables(card), head_dim, key_width, values);
    return bytes > 0 && bytes <= card.shared_bytes;
  };
  return card.capability >= 80 && fits(value_width) && (!scores || fits(key_width));
}

/// How a layer's keys and values are coded and attended to on a device. Tiles (tile_shape.h) do for all formats of the
/// head sizes that there are kernels for, and are slower than tables.
enum class AttendBy { tables, tiles, nothing };

inline AttendBy attend_by(const Card& card, const Format& keys, const Format& values, bool scores) {
  if (keys.head_dim != values.head_dim) return AttendBy::nothing;
  if (cuda_supports(keys) && cuda_supports(values) &&
      tables_fit(card, keys.head_dim, keys.width(0), values.width(0), scores)) {
    return AttendBy::tables;
  }
  const bool can =
      tiles_support(keys) && tiles_support(values) && tile_shared_bytes(keys.head_dim, false) <= card.shared_bytes;
  return can ? AttendBy::tiles : AttendBy::nothing;
}

}  // namespace thimble::cuda
