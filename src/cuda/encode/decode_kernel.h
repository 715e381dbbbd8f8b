// Decodes blocks of 64 cells to f16 rows: the kernel's body. Grid [n_streams * n_kv_heads][blocks of 64 cells].
#pragma once

#include "cuda/layout.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// `Width`: of all subspaces, in the order for tables; 0: any, in the order for tiles.
template <int HeadDim, int Width>
struct DecodeKernel {
  static constexpr int D = HeadDim;
  static constexpr int kThreads = 256;

  SIMT static void run(const DecodeArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const CodeOrder order{D, Width, a.codec.n_width2, a.codec.n_width4};
    const int M = order.n_subspaces();
    const int stream = simt::block_y() / a.n_kv_heads, head = simt::block_y() % a.n_kv_heads;
    const uint8_t* block = a.cache.data + stream * a.cache.stream_stride + head * a.cache.head_stride +
                           simt::block_x() * a.cache.block_stride;
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + M * kBlockCells);
    const float* shift = a.shift ? a.shift + head * D : nullptr;
    const float* words = a.codec.words + size_t(head) * D * kCodewords;
    uint16_t* rows = a.rows + (size_t(simt::block_y()) * a.n_cells + simt::block_x() * kBlockCells) * D;
    // Two components each: no subspace has fewer.
    constexpr int kStep = Width > 0 ? Width : 2;
    for (int i = simt::thread(); i < kBlockCells * (D / kStep); i += kThreads) {
      const int cell = i / (D / kStep), d = i % (D / kStep) * kStep;
      const int code = block[order.position(a.is_key ? Kind::key : Kind::value, order.subspace_of(d), cell)];
      const float s = simt::half_to_float(scales[cell]), scale = code & 0x80 ? -s : s;
      uint32_t* out = reinterpret_cast<uint32_t*>(rows + cell * D + d);
      SIMT_UNROLL
      for (int j = 0; j < kStep; j += 2) {
        const float* word = words + (d + j) * kCodewords + (code & 0x7f);
        float low = simt::mul_rn(scale, word[0]), high = simt::mul_rn(scale, word[kCodewords]);
        if (shift) {
          low = simt::add_rn(low, shift[d + j]);
          high = simt::add_rn(high, shift[d + j + 1]);
        }
        out[j / 2] = simt::pack_half2(low, high);
      }
    }
  }
};

}  // namespace thimble::cuda
