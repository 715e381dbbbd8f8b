// How one vector (one token's K or V of one KV head, `head_dim` numbers) is laid out in memory.
//
// Coded vectors are cut into subspaces of 2, 4 or 8 numbers. Each subspace takes one byte: 7 bits of codeword index
// and, in the highest bit, the codeword's sign. So a width of 2, 4, 8 costs 4, 2, 1 bits a number, and mixing widths
// gives every rate between. A vector has one f16 scale besides.
//
// Cells are stored in blocks of 64, one KV head to a block:
//   coded:  code[n_subspaces][64] bytes, then scale[64] as f16
//   f16:    value[64][head_dim] as f16
// Within a row of 64 code bytes, cells are permuted (`key_position`, `value_position`) so that the CPU kernels'
// widening and packing instructions yield cells in order, for free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace thimble {

inline constexpr int kBlockCells = 64;
inline constexpr int kCodewords = 128;  // of a subspace; the sign bit doubles them
inline constexpr int kMaxHeadDim = 512;

enum class Kind { key, value };

struct Format {
  int head_dim = 0;
  bool f16 = false;  // pass-through: no subspaces
  // Subspaces by width, in the order in which they cover the vector: first all of width 2, then 4, then 8.
  int n_width2 = 0;
  int n_width4 = 0;
  int n_width8 = 0;

  bool operator==(const Format&) const = default;

  int n_subspaces() const { return n_width2 + n_width4 + n_width8; }
  int width(int subspace) const { return subspace < n_width2 ? 2 : subspace < n_width2 + n_width4 ? 4 : 8; }
  /// First component of a subspace.
  int offset(int subspace) const;
  size_t codes_bytes() const { return size_t(n_subspaces()) * kBlockCells; }
  size_t block_bytes() const {
    return f16 ? size_t(head_dim) * kBlockCells * 2 : codes_bytes() + kBlockCells * sizeof(uint16_t);
  }
  /// Bits a number without the vector's scale.
  double bits() const { return f16 ? 16.0 : 8.0 * n_subspaces() / head_dim; }
  /// Bytes of one vector, its scale included.
  double vector_bytes() const { return double(block_bytes()) / kBlockCells; }
};

/// The format for `bits` a number: 16 (f16), 4, 3, 2, 1.5, 1.25 or 1.
/// Throws std::invalid_argument on another rate or a head size that is not even or beyond kMaxHeadDim.
Format make_format(int head_dim, double bits);

/// The format for the part of a latent row (MLA) that RoPE rotates, behind the part of format `latent`: of 4 bits a
/// number or as many as fit, where both parts together are to take at most `bytes` a vector, scales included; no less
/// than 2. f16 where `latent` is.
Format make_position_format(int head_dim, const Format& latent, size_t bytes);

/// Byte in a row of 64 codes that holds a cell's key: even bytes hold cells 0-31, odd bytes 32-63, so that masking and
/// shifting 16-bit lanes yields cells in order.
constexpr int key_position(int cell) {
  return cell < 32 ? 2 * cell : 2 * (cell - 32) + 1;
}

/// The same for values: the order that packing four registers of 16 32-bit lanes yields (packs, packus).
constexpr int value_position(int cell) {
  return (cell % 16) / 4 * 16 + cell / 16 * 4 + cell % 4;
}

constexpr int code_position(Kind kind, int cell) {
  return kind == Kind::key ? key_position(cell) : value_position(cell);
}

}  // namespace thimble
