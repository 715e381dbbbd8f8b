// The CUDA order of the code bytes in a block of 64 cells: a permutation of the record in codec/format.h, of the same
// size, with the scales after the codes in natural order as there. `cuda_position` is the permutation.
//
// A warp takes a whole block. Thirty-two lanes load 16 bytes each, side by side, n_subspaces / 8 times; byte n of a
// lane's stream lies at (n / 16) * 512 + lane * 16 + n % 16. Lanes are called (g, t) = (lane / 4, lane % 4), as in the
// tensor cores' fragments.
//
//   keys:   lane (g, t) holds the cells 8g .. 8g+7 and the subspaces that are t modulo 4. It walks them in an order
//           rotated by g, so that at every step the 32 lanes look into 32 different subspaces, that is, into different
//           banks of shared memory.
//   values: lane (g, t) holds the subspaces that are g modulo 8 and the cells of 8t .. 8t+7 and 8t+32 .. 8t+39, four
//           consecutive ones to a 32-bit word: the rows and columns of an 8-bit A fragment, V transposed.
//
// Formats: one width for all subspaces, head_dim 64, 128 or 256.
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

/// Whether the kernels have code for this format.
bool cuda_supports(const Format& format);

// One block from the CPU's order to the GPU's and back, format.block_bytes() each. The two must not overlap, and the
// format must be supported.
void block_to_cuda(const Format& format, Kind kind, const uint8_t* block, uint8_t* cuda_block);
void block_from_cuda(const Format& format, Kind kind, const uint8_t* cuda_block, uint8_t* block);

}  // namespace thimble::cuda
