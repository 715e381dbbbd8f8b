// Decodes blocks of 64 cells to f16 rows: the kernels' bodies.
#pragma once

#include "cuda/layout.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// Of one width for all subspaces, in the order for tables. Grid [n_streams * n_kv_heads][groups of kBlocks blocks].
///
/// A thread block has its head's codewords in shared memory, as the 8-bit numbers that they are made of, a codeword of
/// all subspaces to a row: lanes that look up different subspaces find them in different banks. A thread decodes the
/// same 4 adjacent components of many cells.
template <int HeadDim, int Width, bool Shifted>
struct DecodeKernel {
  static constexpr int D = HeadDim, W = Width, M = D / W;
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 512 / D;                    // of cells, to a thread block
  static constexpr int kParts = D / 4;                       // of a row, one to a thread
  static constexpr int kTogether = kThreads / kParts;        // cells that a thread block decodes at once
  static constexpr int kBlockBytes = (M + 2) * kBlockCells;  // codes and scales
  static_assert(W == 2 || W == 4 || W == 8);

  /// Byte p of a block of cells. Codes of values that are wanted at once lie 64 bytes apart: 4 more bytes after each 64
  /// bring them to different banks.
  SIMT static int padded(int p) { return p + p / 64 * 4; }

  struct alignas(16) Shared {
    uint32_t words[kCodewords * kParts];
    uint8_t blocks[kBlocks][kBlockBytes + kBlockBytes / 64 * 4];
  };
  static constexpr size_t kSharedBytes = sizeof(Shared);

  SIMT static void run(const DecodeArgs& a) {
    simt::launch_dependents();
    Shared& s = *reinterpret_cast<Shared*>(simt::shared());
    const int stream = simt::block_y() / a.n_kv_heads, head = simt::block_y() % a.n_kv_heads;
    const uint32_t* words = a.codec.packed + size_t(head) * kCodewords * kParts;
    for (int i = simt::thread(); i < kCodewords * kParts / 4; i += kThreads) {
      *reinterpret_cast<uint4*>(s.words + 4 * i) = simt::load_vector(words + 4 * i);
    }
    const int part = simt::thread() % kParts, d = part * 4;
    constexpr int kCodes = W == 2 ? 2 : 1;  // of a part
    float factor[kCodes], shift[4] = {};
    for (int k = 0; k < kCodes; k++) factor[k] = simt::load_constant(a.codec.scale + head * M + d / W + k);
    SIMT_UNROLL
    for (int k = 0; Shifted && k < 4; k++) shift[k] = simt::load_constant(a.shift + head * D + d + k);

    const int first = simt::block_x() * kBlocks, left = a.n_cells / kBlockCells - first;
    const int n_blocks = left < kBlocks ? left : kBlocks;
    simt::wait_for_previous_grid();
    const uint8_t* data =
        a.cache.data + stream * a.cache.stream_stride + head * a.cache.head_stride + first * a.cache.block_stride;
    for (int i = simt::thread(); i < n_blocks * (kBlockBytes / 16); i += kThreads) {
      const int block = i / (kBlockBytes / 16), p = i % (kBlockBytes / 16) * 16;
      const uint4 v = simt::load_stream(data + block * a.cache.block_stride + p);
      uint32_t* to = reinterpret_cast<uint32_t*>(s.blocks[block] + padded(p));
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
    simt::sync();
    uint16_t* rows = a.rows + (size_t(simt::block_y()) * a.n_cells + first * kBlockCells) * D + d;
    SIMT_UNROLL_BY(4)
    for (int i = simt::thread() / kParts; i < n_blocks * kBlockCells; i += kTogether) {
      const uint8_t* block = s.blocks[i / kBlockCells];
      const int cell = i % kBlockCells;
      const float scale = simt::half_to_float(
          *reinterpret_cast<const uint16_t*>(block + padded(M * kBlockCells + cell * int(sizeof(uint16_t)))));
      float x[4];
      SIMT_UNROLL
      for (int k = 0; k < kCodes; k++) {
        const int code = block[padded(position(a.is_key, d / W + k, cell))];
        const float signed_scale = code & 0x80 ? -scale : scale;
        const uint32_t numbers = word(s, a.is_key, code & 0x7f, d, k);
        SIMT_UNROLL
        for (int j = 0; j < 4 / kCodes; j++) {
          // 2^23 and a byte above -128: its number is the rest.
          const float number =
              simt::sub_rn(simt::bits_to_float(simt::permute(numbers, 0x4b000000, 0x7540 + j)), 8388736.0f);
          x[k * 2 + j] = simt::mul_rn(signed_scale, simt::mul_rn(factor[k], number));
        }
      }
      SIMT_UNROLL
      for (int k = 0; Shifted && k < 4; k++) x[k] = simt::add_rn(x[k], shift[k]);
      *reinterpret_cast<uint2*>(rows + size_t(i) * D) =
          make_uint2(simt::pack_half2(x[0], x[1]), simt::pack_half2(x[2], x[3]));
    }
  }

private:
  /// Where the code of subspace m lies.
  SIMT static int position(bool is_key, int m, int cell) {
    return is_key ? cuda_key_position(M, m, cell) : cuda_value_position(m, cell);
  }
  /// The numbers of a codeword, 128 added: those of components d to d + 3, or, at width 2, of the k-th two of them.
  SIMT static uint32_t word(const Shared& s, bool is_key, int code, int d, int k) {
    if constexpr (W == 2) {
      const int at = packed_position(is_key, d / 2 + k);
      return uint32_t(reinterpret_cast<const uint16_t*>(s.words)[code * (D / 2) + at]) ^ 0x8080;
    } else {
      return s.words[code * kParts + d / 4] ^ 0x80808080;
    }
  }
  /// Which two bytes of a codeword of width 2 are subspace m's.
  SIMT static int packed_position(bool is_key, int m) { return is_key ? m : packed_pair(m); }
};

/// Of any widths, in the order for tiles, two components at a time: no subspace has fewer. Grid [n_streams *
/// n_kv_heads][blocks of 64 cells]. A branch on a shift made calls without one take two thirds more time.
template <int HeadDim, bool Shifted>
struct DecodeKernel<HeadDim, 0, Shifted> {
  static constexpr int D = HeadDim, M = D / 2;
  static constexpr int kThreads = 256, kBlocks = 1;
  static constexpr size_t kSharedBytes = 0;

  SIMT static void run(const DecodeArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const int stream = simt::block_y() / a.n_kv_heads, head = simt::block_y() % a.n_kv_heads;
    const uint8_t* block = a.cache.data + stream * a.cache.stream_stride + head * a.cache.head_stride +
                           simt::block_x() * a.cache.block_stride;
    const CodeOrder order = a.codec.order();
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + order.n_subspaces() * kBlockCells);
    const float* words = a.codec.words + size_t(head) * D * kCodewords;
    uint16_t* rows = a.rows + (size_t(simt::block_y()) * a.n_cells + simt::block_x() * kBlockCells) * D;
    for (int i = simt::thread(); i < kBlockCells * M; i += kThreads) {
      const int cell = i / M, d = i % M * 2;
      const int code = block[order.position(a.is_key ? Kind::key : Kind::value, order.subspace_of(d), cell)];
      const float s = simt::half_to_float(scales[cell]), scale = code & 0x80 ? -s : s;
      const float* word = words + d * kCodewords + (code & 0x7f);
      float low = simt::mul_rn(scale, word[0]), high = simt::mul_rn(scale, word[kCodewords]);
      if constexpr (Shifted) {
        low = simt::add_rn(low, a.shift[head * D + d]);
        high = simt::add_rn(high, a.shift[head * D + d + 1]);
      }
      reinterpret_cast<uint32_t*>(rows + cell * D)[d / 2] = simt::pack_half2(low, high);
    }
  }
};

}  // namespace thimble::cuda
