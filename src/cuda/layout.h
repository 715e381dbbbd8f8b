// The CUDA orders of the code bytes in a block of 64 cells: permutations of the record in codec/format.h, of the same
// size, with the scales after the codes in natural order as there. A warp takes a whole block. Lanes are called (g, t)
// = (lane / 4, lane % 4), as in the tensor cores' fragments.
//
// For kernels with tables (attend/shape.h), which take one width for all subspaces, `cuda_position` is the permutation.
// Thirty-two lanes load 16 bytes each, side by side, n_subspaces / 8 times; byte n of a lane's stream lies at (n / 16)
// * 512 + lane * 16 + n % 16.
//
//   keys:   lane (g, t) holds the cells 8g .. 8g+7 and the subspaces that are t modulo 4. It walks them in an order
//           rotated by g, so that at every step the 32 lanes look into 32 different subspaces, that is, into different
//           banks of shared memory.
//   values: lane (g, t) holds the subspaces that are g modulo 8 and the cells of 8t .. 8t+7 and 8t+32 .. 8t+39, four
//           consecutive ones to a 32-bit word: the rows and columns of an 8-bit A fragment, V transposed.
//
// For the kernels that decode tiles (attend/tile_cells.h), `tile_position` is the permutation. A unit is 8 adjacent
// numbers: 4, 2 or 1 subspaces of one width. A unit's codes of all 64 cells are adjacent, and in them each lane's:
//
//   keys:   lane (g, t) takes units that are t modulo 4, of the cells g, g + 8, ..., g + 56.
//   values: lane (g, t) takes units that are g modulo 8, of the cells 2t, 2t + 1, 2t + 8, 2t + 9 of each 16.
//
// Head sizes are 64, 128 and 256.
//
// For layers that are read as rows (rows/rows.h) codes of any head size lie in the plain order, a subspace's of all 64
// cells one behind the other; and f16 blocks as codec/format.h has them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/format.h"

#ifdef __CUDACC__
#define THIMBLE_HOST_DEVICE __host__ __device__
#else
#define THIMBLE_HOST_DEVICE
#endif

namespace thimble::cuda {

/// Where byte n of lane (g, t)'s stream lies within the block's codes.
THIMBLE_HOST_DEVICE constexpr int stream_position(int g, int t, int n) {
  return n / 16 * 512 + (4 * g + t) * 16 + n % 16;
}

/// Steps in which a lane walks its keys' subspaces before it comes to the next 32 of them.
THIMBLE_HOST_DEVICE constexpr int key_steps(int n_subspaces) {
  return n_subspaces >= 32 ? 8 : n_subspaces / 4;
}

THIMBLE_HOST_DEVICE constexpr int cuda_key_position(int n_subspaces, int subspace, int cell) {
  const int g = cell / 8, t = subspace % 4, steps = key_steps(n_subspaces);
  const int step = (subspace % 32 / 4 - g + 8) % steps;
  return stream_position(g, t, cell % 8 * (n_subspaces / 4) + subspace / 32 * 8 + step);
}

THIMBLE_HOST_DEVICE constexpr int cuda_value_position(int subspace, int cell) {
  const int t = cell / 8 % 4, high = cell / 32, chunk = cell % 8 / 4;
  return stream_position(subspace % 8, t, ((subspace / 8 * 2 + chunk) * 2 + high) * 4 + cell % 4);
}

THIMBLE_HOST_DEVICE constexpr int cuda_position(Kind kind, int n_subspaces, int subspace, int cell) {
  return kind == Kind::key ? cuda_key_position(n_subspaces, subspace, cell) : cuda_value_position(subspace, cell);
}

/// Codewords in CodecTables::packed: which two bytes, of a codeword of width 2, are a value's subspace m. The subspaces
/// u * 16 + g and u * 16 + 8 + g make one 32-bit entry, as the value table has them.
THIMBLE_HOST_DEVICE constexpr int packed_pair(int subspace) {
  return (subspace / 16 * 8 + subspace % 8) * 2 + subspace / 8 % 2;
}

/// Place of a code among those of a unit, whose subspaces are `in_unit` in number.
THIMBLE_HOST_DEVICE constexpr int tile_position(Kind kind, int subspace, int number, int in_unit, int cell) {
  const int of_key = cell % 8 * 8 + cell / 8;
  const int of_value = cell % 8 / 2 * 16 + cell / 16 * 4 + cell % 16 / 8 * 2 + cell % 2;
  return (subspace - number) * kBlockCells + (kind == Kind::key ? of_key : of_value) * in_unit + number;
}

// CodeOrder::width of codes in another order than that for tables.
inline constexpr int kTileOrder = 0, kPlainOrder = -1;
inline constexpr int kF16Rows = -2;  // not coded

/// What kernels know of a format: which numbers make a subspace, and where their codes lie.
struct CodeOrder {
  int head_dim = 0;
  int width = 0;                   // of all subspaces, in the order for tables; or one of those above
  int n_width2 = 0, n_width4 = 0;  // as in Format: subspaces of width 2 come first, then 4, then 8

  THIMBLE_HOST_DEVICE constexpr int n_subspaces() const {
    if (width > 0) return head_dim / width;
    if (width == kF16Rows) return 0;
    return n_width2 + n_width4 + (head_dim - 2 * n_width2 - 4 * n_width4) / 8;
  }
  THIMBLE_HOST_DEVICE constexpr bool is_f16() const { return width == kF16Rows; }
  /// The subspace of component d.
  THIMBLE_HOST_DEVICE constexpr int subspace_of(int d) const {
    if (width > 0) return d / width;
    const int behind2 = d - 2 * n_width2, behind4 = behind2 - 4 * n_width4;
    return behind2 < 0 ? d / 2 : n_width2 + (behind4 < 0 ? behind2 / 4 : n_width4 + behind4 / 8);
  }
  /// Of component d's subspace: how many components it has, and the first of them.
  THIMBLE_HOST_DEVICE constexpr int width_of(int d) const {
    if (width > 0) return width;
    return d < 2 * n_width2 ? 2 : d < 2 * n_width2 + 4 * n_width4 ? 4 : 8;
  }
  THIMBLE_HOST_DEVICE constexpr int first_of(int d) const {
    const int of_width2 = 2 * n_width2, of_width4 = of_width2 + 4 * n_width4, w = width_of(d);
    const int begin = width > 0 || w == 2 ? 0 : w == 4 ? of_width2 : of_width4;
    return d - (d - begin) % w;
  }
  /// Where a subspace's code of a cell, 0 to 63, lies in a block.
  THIMBLE_HOST_DEVICE constexpr int position(Kind kind, int subspace, int cell) const {
    if (width > 0) return cuda_position(kind, n_subspaces(), subspace, cell);
    if (width == kPlainOrder) return subspace * kBlockCells + cell;
    const int behind2 = subspace - n_width2;
    if (behind2 < 0) return tile_position(kind, subspace, subspace % 4, 4, cell);
    if (behind2 < n_width4) return tile_position(kind, subspace, behind2 % 2, 2, cell);
    return tile_position(kind, subspace, 0, 1, cell);
  }
};

/// Whether there are kernels with tables for this format.
bool cuda_supports(const Format& format);
/// Whether there are kernels that decode this format to tiles.
bool tiles_support(const Format& format);

/// The order of a format's codes. With `tiles` tiles_support(format) must hold, else cuda_supports(format).
CodeOrder code_order(const Format& format, bool tiles = false);
/// That of layers which are read as rows, for any format.
CodeOrder plain_order(const Format& format);

// One block from the CPU's order to the GPU's and back, format.block_bytes() each. The two must not overlap. `tiles` as
// in code_order.
void block_to_cuda(const Format& format, Kind kind, const uint8_t* block, uint8_t* cuda_block, bool tiles = false);
void block_from_cuda(const Format& format, Kind kind, const uint8_t* cuda_block, uint8_t* block, bool tiles = false);

}  // namespace thimble::cuda
