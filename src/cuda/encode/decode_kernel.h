// Decodes blocks of 64 cells to f16 rows: the kernels' bodies.
#pragma once

#include "cuda/layout.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// Cells of one width for all subspaces, in the order for tables, as a thread block has them in shared memory: kBlocks
/// blocks of codes, and its head's codewords as the 8-bit numbers that they are made of, a codeword of all subspaces to
/// a row: lanes that look up different subspaces find them in different banks.
template <int HeadDim, int Width>
struct CodedCells {
  static constexpr int D = HeadDim, W = Width, M = D / W;
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 512 / D;                    // of cells, to a thread block
  static constexpr int kParts = D / 4;                       // of a row: 4 adjacent components each
  static constexpr int kBlockBytes = (M + 2) * kBlockCells;  // codes and scales
  static constexpr int kCodes = W == 2 ? 2 : 1;              // of a part
  static_assert(W == 2 || W == 4 || W == 8);

  /// Byte p of a block of cells. Codes of values that are wanted at once lie 64 bytes apart: 4 more bytes after each 64
  /// bring them to different banks.
  SIMT static int padded(int p) { return p + p / 64 * 4; }

  struct alignas(16) Shared {
    uint32_t words[kCodewords * kParts];
    uint8_t blocks[kBlocks][kBlockBytes + kBlockBytes / 64 * 4];
  };

  Shared& s;
  bool is_key;

  SIMT void load_words(const DecodeArgs& a, int head) const {
    const uint32_t* words = a.codec.packed + size_t(head) * kCodewords * kParts;
    for (int i = simt::thread(); i < kCodewords * kParts / 4; i += kThreads) {
      *reinterpret_cast<uint4*>(s.words + 4 * i) = simt::load_vector(words + 4 * i);
    }
  }
  SIMT void load_blocks(const DecodeArgs& a, const uint8_t* data, int n_blocks) const {
    for (int i = simt::thread(); i < n_blocks * (kBlockBytes / 16); i += kThreads) {
      const int block = i / (kBlockBytes / 16), p = i % (kBlockBytes / 16) * 16;
      const uint4 v = simt::load_stream(data + block * a.cache.block_stride + p);
      uint32_t* to = reinterpret_cast<uint32_t*>(s.blocks[block] + padded(p));
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
  }

  /// The code of subspace m.
  SIMT int code(int block, int m, int cell) const {
    return s.blocks[block][padded(is_key ? cuda_key_position(M, m, cell) : cuda_value_position(m, cell))];
  }
  SIMT float scale(int block, int cell) const {
    const int at = padded(M * kBlockCells + cell * int(sizeof(uint16_t)));
    return simt::half_to_float(*reinterpret_cast<const uint16_t*>(s.blocks[block] + at));
  }
  /// The numbers of a codeword, 128 added: those of components d to d + 3, or, at width 2, of the k-th two of them.
  SIMT uint32_t word(int code, int d, int k) const {
    if constexpr (W == 2) {
      const int m = d / 2 + k;
      return uint32_t(reinterpret_cast<const uint16_t*>(s.words)[code * (D / 2) + (is_key ? m : packed_pair(m))]) ^
             0x8080;
    } else {
      return s.words[code * kParts + d / 4] ^ 0x80808080;
    }
  }
};

/// Of one width. Grid [n_streams * n_kv_heads][groups of kBlocks blocks]. A thread decodes the same 4 adjacent
/// components of many cells.
template <int HeadDim, int Width, bool Shifted>
struct DecodeKernel {
  using Cells = CodedCells<HeadDim, Width>;
  static constexpr int D = HeadDim, W = Width, kParts = Cells::kParts, kCodes = Cells::kCodes;
  static constexpr int kThreads = Cells::kThreads, kBlocks = Cells::kBlocks, kResident = 1;
  static constexpr int kTogether = kThreads / kParts;  // cells that a thread block decodes at once
  static constexpr size_t kSharedBytes = sizeof(typename Cells::Shared);

  SIMT static void run(const DecodeArgs& a) {
    simt::launch_dependents();
    const Cells cells{*reinterpret_cast<typename Cells::Shared*>(simt::shared()), a.is_key};
    const int stream = simt::block_y() / a.n_kv_heads, head = simt::block_y() % a.n_kv_heads;
    cells.load_words(a, head);
    const int part = simt::thread() % kParts, d = part * 4;
    float factor[kCodes], shift[4] = {};
    for (int k = 0; k < kCodes; k++) factor[k] = simt::load_constant(a.codec.scale + head * (D / W) + d / W + k);
    SIMT_UNROLL
    for (int k = 0; Shifted && k < 4; k++) shift[k] = simt::load_constant(a.shift + head * D + d + k);

    const int first = simt::block_x() * kBlocks, left = a.n_cells / kBlockCells - first;
    const int n_blocks = left < kBlocks ? left : kBlocks;
    simt::wait_for_previous_grid();
    cells.load_blocks(
        a, a.cache.data + stream * a.cache.stream_stride + head * a.cache.head_stride + first * a.cache.block_stride,
        n_blocks);
    simt::sync();
    uint16_t* rows = a.rows + (size_t(simt::block_y()) * a.n_cells + first * kBlockCells) * D + d;
    SIMT_UNROLL_BY(4)
    for (int i = simt::thread() / kParts; i < n_blocks * kBlockCells; i += kTogether) {
      const int block = i / kBlockCells, cell = i % kBlockCells;
      const float scale = cells.scale(block, cell);
      float x[4];
      SIMT_UNROLL
      for (int k = 0; k < kCodes; k++) {
        const int code = cells.code(block, d / W + k, cell);
        const float signed_scale = code & 0x80 ? -scale : scale;
        const uint32_t numbers = cells.word(code & 0x7f, d, k);
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
};

/// Of one width, and with the Hadamard rotation undone: rows as the model wrote them. Grid as DecodeKernel's.
///
/// The rotation is its own inverse, and one of 16 numbers, by the tensor cores, and then one of D / 16 in registers. A
/// warp takes 16 cells, and lane (g, t) of it, as in fragments, the cells g and g + 8, of which it decodes the part
/// part(chunk, t) of each chunk of 16 components. Lanes of different g walk the chunks in different orders, so that
/// all look into different banks: chunk j ^ g at step j. What that does to the rotation of the chunks is to change the
/// sign of output chunk c where c & g has an odd number of bits.
///
/// Numbers are rounded to f16 before the rotation and behind it: the error is to 2^-11 of a row's norm what rounding
/// makes.
template <int HeadDim, int Width>
struct RestoreKernel {
  using Cells = CodedCells<HeadDim, Width>;
  static constexpr int D = HeadDim, W = Width, kChunks = D / 16, kCodes = Cells::kCodes;
  static constexpr int kThreads = Cells::kThreads, kWarps = kThreads / 32, kBlocks = Cells::kBlocks;
  static constexpr int kResident = D == 256 ? 1 : 2;
  static constexpr size_t kSharedBytes = sizeof(typename Cells::Shared);

  /// Two chunks and four lanes t have 32 components side by side, 8 a lane.
  SIMT static int part(int chunk, int t) { return (chunk & 1) | t << 1 | chunk / 2 << 3; }
  SIMT static bool odd(int bits) { return simt::popcount(uint32_t(bits)) & 1; }

  /// Operand B: the rotation of a chunk's components 4 t + i. Rows of B, the columns of A, have them in the order in
  /// which a lane's two registers of A do, columns so that a lane's outputs are those that it had.
  SIMT static uint32_t signs(int lane, int tile, int half) {
    const int from = lane % 4 * 4 + 2 * half, to = lane / 8 * 4 + 2 * tile + lane / 4 % 2;
    return (odd(from & to) ? 0xbc00u : 0x3c00u) | (odd((from + 1) & to) ? 0xbc000000u : 0x3c000000u);
  }

  SIMT static void run(const DecodeArgs& a) {
    simt::launch_dependents();
    const Cells cells{*reinterpret_cast<typename Cells::Shared*>(simt::shared()), a.is_key};
    const int stream = simt::block_y() / a.n_kv_heads, head = simt::block_y() % a.n_kv_heads;
    cells.load_words(a, head);
    const int lane = simt::thread() % 32, g = lane / 4, t = lane % 4, skew = g % kChunks;
    uint32_t factor[kChunks][kCodes], b[2][2], flip[kChunks];
    SIMT_UNROLL
    for (int j = 0; j < kChunks; j++) {
      SIMT_UNROLL
      for (int k = 0; k < kCodes; k++) {
        const float f = simt::load_constant(a.codec.scale + head * (D / W) + part(j ^ skew, t) * 4 / W + k);
        factor[j][k] = simt::pack_half2(f, f);
      }
      flip[j] = odd(j & skew) ? 0x80008000u : 0;
    }
    SIMT_UNROLL
    for (int i = 0; i < 4; i++) b[i / 2][i % 2] = signs(lane, i / 2, i % 2);

    const int first = simt::block_x() * kBlocks, left = a.n_cells / kBlockCells - first;
    const int n_blocks = left < kBlocks ? left : kBlocks;
    simt::wait_for_previous_grid();
    cells.load_blocks(
        a, a.cache.data + stream * a.cache.stream_stride + head * a.cache.head_stride + first * a.cache.block_stride,
        n_blocks);
    simt::sync();
    uint16_t* rows = a.rows + (size_t(simt::block_y()) * a.n_cells + first * kBlockCells) * D;
    SIMT_NO_UNROLL
    for (int i = simt::thread() / 32; i < n_blocks * (kBlockCells / 16); i += kWarps) {
      const int block = i / (kBlockCells / 16), cell = i % (kBlockCells / 16) * 16 + g;
      // Read again, as addresses of all parts, kept from round to round, would not fit into registers.
      const int again = simt::thread_again() % 32, order = again / 4 % kChunks, column = again % 4;
      float x[kChunks][2][4];
      SIMT_UNROLL
      for (int j = 0; j < kChunks; j++) {
        uint32_t numbers[2][2];  // of the two cells: components 0 and 1, 2 and 3 of the part
        SIMT_UNROLL
        for (int k = 0; k < 2; k++) decode(cells, block, part(j ^ order, column), cell + 8 * k, factor[j], numbers[k]);
        SIMT_UNROLL
        for (int tile = 0; tile < 2; tile++) {
          SIMT_UNROLL
          for (int k = 0; k < 4; k++) x[j][tile][k] = 0;
          simt::mma_f16(x[j][tile], numbers[0][0], numbers[1][0], numbers[0][1], numbers[1][1], b[tile][0], b[tile][1]);
        }
      }
      rotate_chunks(x);
      SIMT_UNROLL
      for (int k = 0; k < 2; k++) {
        constexpr float norm = D == 64 ? 0.125f : D == 128 ? 0.0883883461f : 0.0625f;  // 1 / sqrt(D)
        const float scale = cells.scale(block, cell + 8 * k) * norm;
        uint16_t* to = rows + (size_t(block) * kBlockCells + cell + 8 * k) * D;
        SIMT_UNROLL
        for (int j = 0; j < kChunks; j += 2) {
          uint32_t two[4];
          SIMT_UNROLL
          for (int n = 0; n < 4; n++) {
            const float* from = x[j + n / 2][n % 2] + 2 * k;
            two[n] = simt::pack_half2(from[0] * scale, from[1] * scale) ^ flip[j + n / 2];
          }
          *reinterpret_cast<uint4*>(to + 4 * part(j, t)) = make_uint4(two[0], two[1], two[2], two[3]);
        }
      }
    }
  }

private:
  /// A part of a cell, without the cell's scale, as two pairs of halves.
  SIMT static void decode(const Cells& cells, int block, int part, int cell, const uint32_t (&factor)[kCodes],
                          uint32_t (&to)[2]) {
    SIMT_UNROLL
    for (int k = 0; k < kCodes; k++) {
      const int code = cells.code(block, part * 4 / W + k, cell);
      const uint32_t word = cells.word(code & 0x7f, part * 4, k), sign = uint32_t(code & 0x80) * 0x01000100u;
      SIMT_UNROLL
      for (int n = 0; n < 2 / kCodes; n++) {
        // Bytes of 128 more than a number become halves of 1024 and 128 more.
        const uint32_t two = simt::permute(word, 0x64646464, n == 0 ? 0x4140 : 0x4342);
        to[k + n] = simt::multiply_halves(simt::subtract_halves(two, 0x64806480), factor[k] ^ sign);
      }
    }
  }

  SIMT static void rotate_chunks(float (&x)[kChunks][2][4]) {
    SIMT_UNROLL
    for (int bit = 1; bit < kChunks; bit *= 2) {
      SIMT_UNROLL
      for (int i = 0; i < kChunks * 8; i++) {
        const int j = i / 8, tile = i / 4 % 2, k = i % 4;
        if (j & bit) continue;
        const float low = x[j][tile][k], high = x[j | bit][tile][k];
        x[j][tile][k] = low + high;
        x[j | bit][tile][k] = low - high;
      }
    }
  }
};

/// Of any widths, in the order for tiles, two components at a time: no subspace has fewer. Grid [n_streams *
/// n_kv_heads][blocks of 64 cells]. A branch on a shift made calls without one take two thirds more time.
template <int HeadDim, bool Shifted>
struct DecodeKernel<HeadDim, 0, Shifted> {
  static constexpr int D = HeadDim, M = D / 2;
  static constexpr int kThreads = 256, kBlocks = 1, kResident = 1;
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
