// NEON: encoding, tiles, softmax.
#include "kernels/neon/neon.h"

namespace thimble {
namespace {

// -- codec --

void nearest(const float* y, float inverse_rms, const float* words, const float* half_norms, int width, int n_subspaces,
             uint8_t* codes) {
  for (int m = 0; m < n_subspaces; m++, y += width, words += width * 128, half_norms += 128) {
    float all_dots[128];
    float32x4_t best_gain = vdupq_n_f32(kHidden);
    int32x4_t best = vdupq_n_s32(0);
    for (int quarter = 0; quarter < 128; quarter += 32) {
      float32x4_t dots[8];
      for (float32x4_t& dot : dots) dot = vdupq_n_f32(0);
      for (int j = 0; j < width; j++) {
        const float32x4_t z = vdupq_n_f32(y[j] * inverse_rms);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
          dots[i] = vaddq_f32(dots[i], vmulq_f32(z, vld1q_f32(words + j * 128 + quarter + 4 * i)));
        }
      }
      for (int i = 0; i < 8; i++) {
        const int first = quarter + 4 * i;
        vst1q_f32(all_dots + first, dots[i]);
        const float32x4_t gain = vsubq_f32(vabsq_f32(dots[i]), vld1q_f32(half_norms + first));
        const uint32x4_t better = vcgtq_f32(gain, best_gain);
        best_gain = vbslq_f32(better, gain, best_gain);
        best = vbslq_s32(better, vdupq_n_s32(first), best);
      }
    }
    // The lowest index among the lanes that reach the top.
    const uint32x4_t equal = vceqq_f32(best_gain, vdupq_n_f32(vmaxvq_f32(best_gain)));
    const int32_t lanes[4] = {0, 1, 2, 3};
    const int index = vminvq_s32(vbslq_s32(equal, vaddq_s32(best, vld1q_s32(lanes)), vdupq_n_s32(127)));
    codes[m] = uint8_t(index | (all_dots[index] < 0 ? 0x80 : 0));
  }
}

template <int Rows, bool Fused>
inline void multiply_rows(const float* a, int a_stride, const float* b, int b_stride, int k, int n, float* c,
                          int c_stride, bool add) {
  int j = 0;
  for (; n - j >= 16; j += 16) {
    float32x4_t sums[Rows][4];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) sums[r][v] = add ? vld1q_f32(c + r * c_stride + j + 4 * v) : vdupq_n_f32(0);
    }
    for (int i = 0; i < k; i++) {
      float32x4_t row[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) row[v] = vld1q_f32(b + i * b_stride + j + 4 * v);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; r++) {
        const float32x4_t x = vdupq_n_f32(a[r * a_stride + i]);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
          sums[r][v] = Fused ? vfmaq_f32(sums[r][v], x, row[v]) : vaddq_f32(sums[r][v], vmulq_f32(x, row[v]));
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) vst1q_f32(c + r * c_stride + j + 4 * v, sums[r][v]);
    }
  }
  for (; j < n; j++) {
    for (int r = 0; r < Rows; r++) {
      float sum = add ? c[r * c_stride + j] : 0.0f;
      for (int i = 0; i < k; i++) sum += a[r * a_stride + i] * b[i * b_stride + j];
      c[r * c_stride + j] = sum;
    }
  }
}

template <bool Fused>
void multiply_all(const float* a, int a_stride, const float* b, int b_stride, int rows, int k, int n, float* c,
                  int c_stride, bool add) {
  int r = 0;
  for (; rows - r >= 4; r += 4) {
    multiply_rows<4, Fused>(a + r * a_stride, a_stride, b, b_stride, k, n, c + r * c_stride, c_stride, add);
  }
  for (; r < rows; r++) {
    multiply_rows<1, Fused>(a + r * a_stride, a_stride, b, b_stride, k, n, c + r * c_stride, c_stride, add);
  }
}

void multiply(const float* a, int a_stride, const float* b, int b_stride, int rows, int k, int n, float* c,
              int c_stride, bool add) {
  multiply_all<true>(a, a_stride, b, b_stride, rows, k, n, c, c_stride, add);
}

void times_matrix(const float* x, int n_rows, const float* m, int dim, float* out) {
  multiply_all<false>(x, dim, m, dim, n_rows, dim, dim, out, dim, false);
}

void hadamard(float* x, int n, int block, float norm) {
  for (int half = 1; half < block; half *= 2) {
    for (int i = 0; i < n; i += 2 * half) {
      int j = i;
      for (; half >= 4 && j < i + half; j += 4) {
        const float32x4_t a = vld1q_f32(x + j), b = vld1q_f32(x + j + half);
        vst1q_f32(x + j, vaddq_f32(a, b));
        vst1q_f32(x + j + half, vsubq_f32(a, b));
      }
      for (; j < i + half; j++) {
        const float a = x[j], b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
    }
  }
  for (int i = 0; i < n; i++) x[i] *= norm;
}

// -- tiles --

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
      // Even bytes are cells from 8 quarters on, odd bytes those 32 further.
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

// 16 rows of 16 bytes become columns. With the row number and the column number written as one number of 8 bits, each
// step rotates it by one bit; four steps exchange the two.
inline void transpose_bytes(uint8x16_t r[16]) {
  for (int step = 0; step < 4; step++) {
    uint8x16_t s[16];
    for (int i = 0; i < 16; i++) s[i] = r[i];
    for (int i = 0; i < 8; i++) {
      r[2 * i] = vzip1q_u8(s[i], s[i + 8]);
      r[2 * i + 1] = vzip2q_u8(s[i], s[i + 8]);
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
        const int cell = i / 4 * 16 + quarter * 4 + i % 4;  // the one whose value_position is 16 * quarter + i
        int8_t word[16];
        vst1q_s8(word, vreinterpretq_s8_u8(r[i]));
        for (int j = 0; j < n; j++) tile[cell * dim + d + j] = cells[cell] * (float(word[j]) * scale[d + j]);
      }
    }
  }
}

// Four halves, fewer at the end of a row.
inline float32x4_t load_halves(const uint8_t* from, int n) {
  if (n >= 4) return load_half(from);
  uint16_t room[4] = {};
  __builtin_memcpy(room, from, 2 * unsigned(n));
  return load_half(room);
}

inline void store_floats(float* to, float32x4_t x, int n) {
  if (n >= 4) return vst1q_f32(to, x);
  float room[4];
  vst1q_f32(room, x);
  for (int i = 0; i < n; i++) to[i] = room[i];
}

void load_keys(const uint8_t* const* rows, int n, int dim, float* tile) {
  for (int cell = 0; cell < kLine; cell += 4) {
    for (int d = 0; d < dim; d += 4) {
      float32x4_t r[4];
      for (int i = 0; i < 4; i++) {
        r[i] = cell + i < n ? load_halves(rows[cell + i] + 2 * d, dim - d) : vdupq_n_f32(0);
      }
      const float32x4x2_t a = vtrnq_f32(r[0], r[1]), b = vtrnq_f32(r[2], r[3]);
      const float32x4_t columns[4] = {vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0])),
                                      vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1])),
                                      vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0])),
                                      vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]))};
      for (int i = 0; i < 4 && d + i < dim; i++) vst1q_f32(tile + (d + i) * kLine + cell, columns[i]);
    }
  }
}

void load_values(const uint8_t* const* rows, int n, int dim, float* tile) {
  for (int cell = 0; cell < n; cell++) {
    for (int d = 0; d < dim; d += 4)
      store_floats(tile + cell * dim + d, load_halves(rows[cell] + 2 * d, dim - d), dim - d);
  }
}

// -- softmax --

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

// x is natural; tanh(x) = 1 - 2 / (e^2x + 1)
inline float32x4_t tanh_of(float32x4_t x) {
  const float32x4_t one = vdupq_n_f32(1.0f);
  const float32x4_t e = exp2_of(vmulq_f32(vminq_f32(x, vdupq_n_f32(20.0f)), vdupq_n_f32(2 * kLog2e)));
  return vsubq_f32(one, vdivq_f32(vdupq_n_f32(2.0f), vaddq_f32(e, one)));
}

float finish_scores(float* scores, int n_blocks, const uint64_t* visible, const uint16_t* const* masks, float bias,
                    float slope, float softcap, const float* log_weight, float* max_log) {
  const int32_t bit_of_lane[4] = {1, 2, 4, 8};
  const int32x4_t bits = vld1q_s32(bit_of_lane);
  const float32x4_t hidden = vdupq_n_f32(kHidden);
  float32x4_t top = hidden, top_log = hidden;
  for (int b = 0; b < n_blocks; b++) {
    for (int i = 0; i < 16; i++) {
      float* at = scores + b * kLine + 4 * i;
      float32x4_t s = vaddq_f32(vld1q_f32(at), vdupq_n_f32(bias));
      if (softcap != 0) s = vmulq_n_f32(tanh_of(vmulq_n_f32(s, 1.0f / softcap)), softcap);
      if (masks) s = vfmaq_n_f32(s, load_half(masks[b] + 4 * i), slope);
      const uint32x4_t lanes = vtstq_s32(vdupq_n_s32(int32_t(visible[b] >> (4 * i) & 15)), bits);
      s = vbslq_f32(lanes, s, hidden);
      vst1q_f32(at, s);
      top = vmaxnmq_f32(s, top);  // a NaN s leaves top
      if (log_weight) {
        const float32x4_t log = vfmaq_n_f32(vld1q_f32(log_weight + b * kLine + 4 * i), s, kLog2e);
        top_log = vmaxnmq_f32(log, top_log);
      }
    }
  }
  if (log_weight) *max_log = vmaxnmvq_f32(top_log);
  return vmaxnmvq_f32(top);
}

float exponentiate(float* scores, int n_cells, float max) {
  float32x4_t sum = vdupq_n_f32(0);
  for (int i = 0; i < n_cells; i += 4) {
    const float32x4_t x = vsubq_f32(vld1q_f32(scores + i), vdupq_n_f32(max));
    const float32x4_t p = exp2_of(vmulq_n_f32(x, kLog2e));
    vst1q_f32(scores + i, p);
    sum = vaddq_f32(sum, p);
  }
  return vaddvq_f32(sum);
}

}  // namespace

const TileOps kNeonTileOps{nearest,     times_matrix, hadamard,  decode_keys,   decode_values, load_keys,
                           load_values, multiply,     mask_bits, finish_scores, exponentiate};

}  // namespace thimble
