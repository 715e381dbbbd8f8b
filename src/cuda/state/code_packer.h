// Where the bytes of one vector lie in a block of the GPU's order. The canonical vector is the one of saved states and
// of copy_cell_out (codec/head_codec.h): the codes of all subspaces, then the f16 scale; or all numbers as f16.
#pragma once

#include "cuda/layout.h"

namespace thimble::cuda {

struct CodePacker {
  Kind kind = Kind::key;
  CodeOrder order;

  /// Bytes of a canonical vector.
  THIMBLE_HOST_DEVICE constexpr int vector_bytes() const {
    return order.is_f16() ? order.head_dim * int(sizeof(uint16_t)) : order.n_subspaces() + int(sizeof(uint16_t));
  }

  /// The byte of a block that holds byte `i` of the vector of cell `cell`, 0 to 63.
  THIMBLE_HOST_DEVICE constexpr int place(int i, int cell) const {
    if (order.is_f16()) return cell * vector_bytes() + i;
    const int n = order.n_subspaces();
    if (i < n) return order.position(kind, i, cell);
    return n * kBlockCells + cell * int(sizeof(uint16_t)) + i - n;
  }
};

}  // namespace thimble::cuda
