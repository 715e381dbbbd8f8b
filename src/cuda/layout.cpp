#include "cuda/layout.h"

#include <cassert>
#include <cstring>

namespace thimble::cuda {
namespace {

// Calls f(position in the CPU's order, position in the GPU's) for every code of a block.
template <typename F>
void for_each_code(const Format& format, Kind kind, F f) {
  assert(cuda_supports(format));
  const int n_subspaces = format.n_subspaces();
  for (int m = 0; m < n_subspaces; m++) {
    for (int cell = 0; cell < kBlockCells; cell++) {
      f(m * kBlockCells + code_position(kind, cell), cuda_position(kind, n_subspaces, m, cell));
    }
  }
}

}  // namespace

bool cuda_supports(const Format& format) {
  const int d = format.head_dim, m = format.n_subspaces();
  return !format.f16 && (d == 64 || d == 128 || d == 256) &&
         (m == format.n_width2 || m == format.n_width4 || m == format.n_width8);
}

void block_to_cuda(const Format& format, Kind kind, const uint8_t* block, uint8_t* cuda_block) {
  for_each_code(format, kind, [=](int cpu, int gpu) { cuda_block[gpu] = block[cpu]; });
  std::memcpy(cuda_block + format.codes_bytes(), block + format.codes_bytes(), kBlockCells * 2);
}

void block_from_cuda(const Format& format, Kind kind, const uint8_t* cuda_block, uint8_t* block) {
  for_each_code(format, kind, [=](int cpu, int gpu) { block[cpu] = cuda_block[gpu]; });
  std::memcpy(block + format.codes_bytes(), cuda_block + format.codes_bytes(), kBlockCells * 2);
}

}  // namespace thimble::cuda
