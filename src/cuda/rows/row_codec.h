// The codec of one vector, of any head size, format and transform, by a warp: bit for bit what codec/head_codec.h and
// codec/transform.h specify. Vectors lie in shared memory that is the warp's own. Slower than encode/ and attend/,
// which have a kernel for each head size.
#pragma once

#include "cuda/encode/nearest.h"
#include "cuda/simt/simt.h"
#include "cuda/state/cell_args.h"
#include "cuda/state/code_packer.h"

namespace thimble::cuda {

/// One head of a cell.
struct RowPlace {
  int stream, cell, head;
};

struct RowCodec {
  const CellArgs& a;

  SIMT static int lane() { return simt::thread() % 32; }

  SIMT RowPlace place(int64_t cell, int head) const {
    return {int(cell / a.cells_per_stream), int(cell % a.cells_per_stream), head};
  }
  SIMT uint16_t* in_window(const RowPlace& p, int slot) const {
    return a.window + ((size_t(p.stream) * a.n_kv_heads + p.head) * a.capacity + slot) * a.head_dim;
  }
  SIMT uint16_t* in_store(const RowPlace& p) const {
    return a.store + ((size_t(p.stream) * a.n_kv_heads + p.head) * a.cells_per_stream + p.cell) * a.head_dim;
  }
  SIMT uint8_t* block(const RowPlace& p) const {
    return a.cache.data + p.stream * a.cache.stream_stride + p.head * a.cache.head_stride +
           p.cell / kBlockCells * a.cache.block_stride;
  }
  SIMT CodePacker packer() const { return {a.is_key ? Kind::key : Kind::value, a.codec.order()}; }

  /// Transform::hadamard in place.
  SIMT void rotate(float* x) const {
    const int n = a.head_dim, block = a.codec.hadamard_block;
    for (int half = 1; half < block; half *= 2) {
      for (int i = lane(); i < n / 2; i += 32) {
        const int at = i / half * 2 * half + i % half;
        const float low = x[at], high = x[at + half];
        x[at] = simt::add_rn(low, high);
        x[at + half] = simt::sub_rn(low, high);
      }
      simt::sync_warp();
    }
    if (block == 1) return;
    const float norm = simt::div_rn(1.0f, simt::sqrt_rn(float(block)));
    for (int d = lane(); d < n; d += 32) x[d] = simt::mul_rn(x[d], norm);
    simt::sync_warp();
  }

  /// y from x, both of shared memory; x is lost.
  SIMT void transform(int head, float* x, float* y) const {
    const int n = a.head_dim;
    if (!a.codec.forward) {
      for (int d = lane(); d < n; d += 32) y[d] = x[d];
      simt::sync_warp();
      return rotate(y);
    }
    for (int d = lane(); d < n; d += 32) x[d] = simt::sub_rn(x[d], a.codec.mean[head * n + d]);
    simt::sync_warp();
    const float* matrix = a.codec.forward + size_t(head) * n * n;
    for (int d = lane(); d < n; d += 32) {
      float sum = 0;
      for (int i = 0; i < n; i++) sum = simt::add_rn(sum, simt::mul_rn(x[i], matrix[size_t(i) * n + d]));
      y[d] = sum;
    }
    simt::sync_warp();
  }

  /// The number of x that lane d % 32 is to write, calls f(d, x): what codes stand for, in the model's own domain. `y`
  /// is scratch.
  template <typename F>
  SIMT void decode(const RowPlace& p, float* y, F f) const {
    const int n = a.head_dim, in_block = p.cell % kBlockCells;
    const uint8_t* coded = block(p);
    const CodePacker at = packer();
    if (at.order.is_f16()) {
      const uint16_t* row = reinterpret_cast<const uint16_t*>(coded) + size_t(in_block) * n;
      for (int d = lane(); d < n; d += 32) f(d, simt::half_to_float(row[d]));
      return;
    }
    const int n_subspaces = at.order.n_subspaces();
    const int low = coded[at.place(n_subspaces, in_block)], high = coded[at.place(n_subspaces + 1, in_block)];
    const float scale = simt::half_to_float(uint16_t(low | high << 8));
    const float* words = a.codec.words + size_t(p.head) * n * kCodewords;
    for (int d = lane(); d < n; d += 32) {
      const int code = coded[at.place(at.order.subspace_of(d), in_block)];
      y[d] = simt::mul_rn(code & 0x80 ? -scale : scale, words[size_t(d) * kCodewords + (code & 0x7f)]);
    }
    simt::sync_warp();
    if (!a.codec.undo) {
      rotate_back(y);
      for (int d = lane(); d < n; d += 32) f(d, y[d]);
    } else {
      // x = y A^-1 + mean. Of keys, the matrix is there transposed.
      const float* undo = a.codec.undo + size_t(p.head) * n * n;
      for (int d = lane(); d < n; d += 32) {
        float sum = 0;
        for (int i = 0; i < n; i++) {
          sum = simt::add_rn(sum, simt::mul_rn(y[i], a.is_key ? undo[size_t(d) * n + i] : undo[size_t(i) * n + d]));
        }
        f(d, simt::add_rn(sum, a.codec.mean[p.head * n + d]));
      }
    }
    simt::sync_warp();
  }

  /// Encodes y; x and codes [n_subspaces] are scratch. All of shared memory.
  SIMT void encode(const RowPlace& p, const float* y, float* x, uint8_t* codes) const {
    const int n = a.head_dim, in_block = p.cell % kBlockCells;
    uint8_t* coded = block(p);
    const CodePacker at = packer();
    if (at.order.is_f16()) {
      uint16_t* row = reinterpret_cast<uint16_t*>(coded) + size_t(in_block) * n;
      for (int d = lane(); d < n; d += 32) row[d] = simt::float_to_half(y[d]);
      return;
    }
    float square = 0;
    for (int d = 0; d < n; d++) square = simt::add_rn(square, simt::mul_rn(y[d], y[d]));
    const bool plain = square != 0 && (simt::float_to_bits(square) & 0x7f800000u) != 0x7f800000u;
    const float inverse_rms = plain ? simt::div_rn(1.0f, simt::sqrt_rn(simt::div_rn(square, float(n)))) : 0.0f;
    const int n2 = at.order.n_width2, n4 = at.order.n_width4, n_subspaces = at.order.n_subspaces();
    const float* words = a.codec.words + size_t(p.head) * n * kCodewords;
    const float* half_norms = a.codec.half_norms + size_t(p.head) * n_subspaces * kCodewords;
    for (int m = 0, first = 0; m < n_subspaces; m++) {
      const int width = m < n2 ? 2 : m < n2 + n4 ? 4 : 8;
      const int code = plain ? nearest(y + first, width, inverse_rms, words + size_t(first) * kCodewords,
                                       half_norms + size_t(m) * kCodewords)
                             : 0;
      if (lane() == 0) codes[m] = uint8_t(code);
      first += width;
    }
    simt::sync_warp();
    for (int m = lane(); m < n_subspaces; m += 32) coded[at.place(m, in_block)] = codes[m];
    uint16_t scale = square == 0 ? uint16_t(0) : uint16_t(0x7e00);
    if (plain) {
      for (int d = lane(); d < n; d += 32) {
        const int code = codes[at.order.subspace_of(d)];
        const float w = words[size_t(d) * kCodewords + (code & 0x7f)];
        x[d] = code & 0x80 ? -w : w;
      }
      simt::sync_warp();
      float along = 0, length = 0;
      for (int d = 0; d < n; d++) {
        along = simt::add_rn(along, simt::mul_rn(y[d], x[d]));
        length = simt::add_rn(length, simt::mul_rn(x[d], x[d]));
      }
      const float best = length > 0 ? simt::div_rn(along, length) : 0.0f;
      scale = simt::float_to_half(65504.0f < best ? 65504.0f : best);
    }
    if (lane() == 0) {
      coded[at.place(n_subspaces, in_block)] = uint8_t(scale);
      coded[at.place(n_subspaces + 1, in_block)] = uint8_t(scale >> 8);
    }
    simt::sync_warp();
  }

private:
  /// The rotation is its own inverse.
  SIMT void rotate_back(float* y) const { rotate(y); }

  /// The code, with its sign, of the nearest codeword; of equal ones the lowest. A lane has four of the 128.
  SIMT static int nearest(const float* y, int width, float inverse_rms, const float* words, const float* half_norms) {
    NearestCode found;
    for (int k = 0; k < kCodewords / 32; k++) {
      const int c = lane() + 32 * k;
      float dot = 0;
      for (int j = 0; j < width; j++) {
        dot = simt::add_rn(dot, simt::mul_rn(simt::mul_rn(y[j], inverse_rms), words[size_t(j) * kCodewords + c]));
      }
      found.offer(c, dot, half_norms[c]);
    }
    found.join_lanes();
    return found.code;
  }
};

}  // namespace thimble::cuda
