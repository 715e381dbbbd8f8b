// NEON: encoding, tiles, softmax.
#include "kernels/neon/neon.h"
#include "kernels/vector/tile_loops.h"

namespace thimble {
namespace {

void decode_keys(const uint8_t* block, const uint8_t* cell_scales, const int8_t* words, const uint8_t* code_row,
                 const float* scale, int dim, float* tile) {
  float32x4_t cells[16];
  for (int i = 0; i < 16; i++) cells[i] = load_half(cell_scales + 8 * i);
  for (int d = 0; d < dim; d++) {
    const Table table = load_table(words + d * 128);
    const float32x4_t component = vdupq_n_f32(scale[d]);
    for (int quarter = 0; quarter < 4; quarter++) {
      const uint8_t* codes = block + code_row[d] * kLine + 16 * quarter;
      const int16x8_t both = vreinterpretq_s16_u8(look_up_16(table, indices_of(load_bytes(codes))));
      // Even bytes are cells 8 * quarter to 8 * quarter + 7, odd bytes the 8 cells from 32 + 8 * quarter on.
      const int16x8_t part[2] = {vshrq_n_s16(vshlq_n_s16(both, 8), 8), vshrq_n_s16(both, 8)};
      for (int odd = 0; odd < 2; odd++) {
        const int vector = 8 * odd + 2 * quarter;
        float* to = tile + d * kLine + 4 * vector;
        vst1q_f32(to, vmulq_f32(cells[vector], vmulq_f32(low_floats(part[odd]), component)));
        vst1q_f32(to + 4, vmulq_f32(cells[vector + 1], vmulq_f32(high_floats(part[odd]), component)));
      }
    }
  }
}

void decode_values(const uint8_t* block, const uint8_t* cell_scales, const int8_t* words, const uint8_t* code_row,
                   const float* scale, int dim, float* tile) {
  float cells[kLine];
  for (int i = 0; i < 16; i++) vst1q_f32(cells + 4 * i, load_half(cell_scales + 8 * i));
  for (int d = 0; d < dim; d += 16) {
    const int n = dim - d < 16 ? dim - d : 16;
    for (int quarter = 0; quarter < 4; quarter++) {
      uint8x16_t r[16];
      for (int i = 0; i < 16; i++) {
        if (i >= n) {
          r[i] = vdupq_n_u8(0);
          continue;
        }
        const uint8_t* codes = block + code_row[d + i] * kLine + 16 * quarter;
        r[i] = look_up_16(load_table(words + (d + i) * 128), indices_of(load_bytes(codes)));
      }
      transpose_bytes(r);
      for (int i = 0; i < 16; i++) {
        const int cell = i / 4 * 16 + quarter * 4 + i % 4;  // its value_position is 16 * quarter + i
        int8_t word[16];
        vst1q_s8(word, vreinterpretq_s8_u8(r[i]));
        for (int j = 0; j < n; j++) tile[cell * dim + d + j] = cells[cell] * (float(word[j]) * scale[d + j]);
      }
    }
  }
}

MaskBits mask_bits(const uint16_t* mask) {
  const uint16_t bit_of_lane[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  const uint16x8_t bits = vld1q_u16(bit_of_lane);
  uint64_t hidden = 0, zero = 0;
  for (int i = 0; i < 8; i++) {
    const uint16x8_t x = vld1q_u16(mask + 8 * i);
    hidden |= uint64_t(vaddvq_u16(vandq_u16(vceqq_u16(x, vdupq_n_u16(0xfc00)), bits))) << (8 * i);
    zero |= uint64_t(vaddvq_u16(vandq_u16(vceqzq_u16(vshlq_n_u16(x, 1)), bits))) << (8 * i);
  }
  return {~hidden, (~hidden & ~zero) != 0};
}

}  // namespace

const TileOps kNeonTileOps{nearest,     times_matrix, hadamard,  decode_keys,   decode_values, load_keys,
                           load_values, multiply,     mask_bits, finish_scores, best_of_rows,  block_maxima,
                           at_least,    exponentiate, nullptr,   nullptr,       nullptr,       nullptr};

}  // namespace thimble
