// Decodes blocks of 64 cells to f16 rows: the kernel's body. Grid [n_streams * n_kv_heads][blocks of 64 cells].
#pragma once

#include "cuda/layout.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// `Width`: of all subspaces, in the order for tables; 0: any, in the order for tiles. `Shifted`: with
/// DecodeArgs::shift; a branch on which made other calls take two thirds more time.
template <int HeadDim, int Width, bool Shifted>
struct DecodeKernel {
  // Of several widths, two components at a time: no subspace has fewer.
  static constexpr int D = HeadDim, W = Width > 0 ? Width : 2, M = D / W;
  static constexpr int kThreads = 256;

  SIMT static void run(const DecodeArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const int stream = simt::block_y() / a.n_kv_heads, head = simt::block_y() % a.n_kv_heads;
    const uint8_t* block = a.cache.data + stream * a.cache.stream_stride + head * a.cache.head_stride +
                           simt::block_x() * a.cache.block_stride;
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + n_subspaces(a) * kBlockCells);
    const float* words = a.codec.words + size_t(head) * D * kCodewords;
    uint16_t* rows = a.rows + (size_t(simt::block_y()) * a.n_cells + simt::block_x() * kBlockCells) * D;
    for (int i = simt::thread(); i < kBlockCells * M; i += kThreads) {
      const int cell = i / M, m = i % M;
      const int code = block[position(a, m, cell)];
      const float s = simt::half_to_float(scales[cell]), scale = code & 0x80 ? -s : s;
      uint32_t* out = reinterpret_cast<uint32_t*>(rows + cell * D + m * W);
      SIMT_UNROLL
      for (int j = 0; j < W; j += 2) {
        const float* word = words + (m * W + j) * kCodewords + (code & 0x7f);
        float low = simt::mul_rn(scale, word[0]), high = simt::mul_rn(scale, word[kCodewords]);
        if constexpr (Shifted) {
          low = simt::add_rn(low, a.shift[head * D + m * W + j]);
          high = simt::add_rn(high, a.shift[head * D + m * W + j + 1]);
        }
        out[j / 2] = simt::pack_half2(low, high);
      }
    }
  }

private:
  SIMT static int n_subspaces(const DecodeArgs& a) { return Width > 0 ? M : a.codec.order().n_subspaces(); }
  /// Where the code of components m * W and the following lies.
  SIMT static int position(const DecodeArgs& a, int m, int cell) {
    if constexpr (Width > 0) {
      return a.is_key ? cuda_key_position(M, m, cell) : cuda_value_position(m, cell);
    } else {
      const CodeOrder order = a.codec.order();
      return order.position(a.is_key ? Kind::key : Kind::value, order.subspace_of(m * W), cell);
    }
  }
};

}  // namespace thimble::cuda
