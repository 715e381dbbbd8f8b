// Decode attention: arithmetic on the bytes of 32-bit words.
#pragma once

#include <cstdint>

#include "cuda/simt/simt.h"

namespace thimble::cuda {

/// Negates each of 4 signed bytes, none of which is -128.
SIMT uint32_t negate_bytes(uint32_t x) {
  return ((~x & 0x7f7f7f7f) + 0x01010101) ^ (~x & 0x80808080);
}

/// Word i of a vector.
SIMT uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

/// Byte `i` of a word as a float. The word's bytes are signed and were XORed with 0x80. A conversion instruction would
/// take longer.
SIMT float byte_to_float(uint32_t biased, int i) {
  return simt::bits_to_float(simt::permute(biased, 0x4b000000u, 0x7440u | i)) - 8388736.0f;
}

/// The second byte of each of 4 words.
SIMT uint32_t second_bytes(const uint32_t (&x)[4]) {
  return simt::permute(simt::permute(x[0], x[1], 0x5151), simt::permute(x[2], x[3], 0x5151), 0x5410);
}

}  // namespace thimble::cuda
