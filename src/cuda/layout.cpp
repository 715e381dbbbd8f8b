#include "cuda/layout.h"

#include <cassert>
#include <cstring>

namespace thimble::cuda {
namespace {

bool has_kernels(int head_dim) {
  return head_dim == 64 || head_dim == 128 || head_dim == 256;
}

// Calls f(position in the CPU's order, position in the GPU's) for every code of a block.
template <typename F>
void for_each_code(const Format& format, Kind kind, bool tiles, F f) {
  const CodeOrder order = code_order(format, tiles);
  for (int m = 0; m < format.n_subspaces(); m++) {
    for (int cell = 0; cell < kBlockCells; cell++) {
      f(m * kBlockCells + code_position(kind, cell), order.position(kind, m, cell));
    }
  }
}

}  // namespace

bool cuda_supports(const Format& format) {
  const int m = format.n_subspaces();
  return !format.f16 && has_kernels(format.head_dim) &&
         (m == format.n_width2 || m == format.n_width4 || m == format.n_width8);
}

// Units have one width.
bool tiles_support(const Format& format) {
  return !format.f16 && has_kernels(format.head_dim) && format.n_width2 % 4 == 0 && format.n_width4 % 2 == 0;
}

CodeOrder code_order(const Format& format, bool tiles) {
  assert(tiles ? tiles_support(format) : cuda_supports(format));
  return {format.head_dim, tiles ? 0 : format.width(0), format.n_width2, format.n_width4};
}

CodeOrder plain_order(const Format& format) {
  return {format.head_dim, format.f16 ? kF16Rows : kPlainOrder, format.n_width2, format.n_width4};
}

void block_to_cuda(const Format& format, Kind kind, const uint8_t* block, uint8_t* cuda_block, bool tiles) {
  for_each_code(format, kind, tiles, [=](int cpu, int gpu) { cuda_block[gpu] = block[cpu]; });
  std::memcpy(cuda_block + format.codes_bytes(), block + format.codes_bytes(), kBlockCells * 2);
}

void block_from_cuda(const Format& format, Kind kind, const uint8_t* cuda_block, uint8_t* block, bool tiles) {
  for_each_code(format, kind, tiles, [=](int cpu, int gpu) { block[cpu] = cuda_block[gpu]; });
  std::memcpy(block + format.codes_bytes(), cuda_block + format.codes_bytes(), kBlockCells * 2);
}

}  // namespace thimble::cuda
