// NEON as every 64-bit Arm has it: tables of 64 bytes in four registers, so a codebook's 128 entries take two look-ups.
#include <arm_neon.h>

#include "attention/isa.h"

namespace thimble {
namespace {

constexpr float kLog2e = 1.44269504f;
constexpr float kHidden = -__builtin_inff();
constexpr int kLine = 64;  // cells to a block

// 2^x for x >= -126 (below, 2^-126), relative error 3e-6. NaN stays NaN.
inline float32x4_t exp2_of(float32x4_t x) {
  x = vmaxq_f32(x, vdupq_n_f32(-126.0f));
  const float32x4_t n = vrndnq_f32(x);
  const float32x4_t f = vsubq_f32(x, n);
  float32x4_t p = vfmaq_f32(vdupq_n_f32(0.055917859f), f, vdupq_n_f32(0.0095701023f));
  p = vfmaq_f32(vdupq_n_f32(0.24024744f), p, f);
  p = vfmaq_f32(vdupq_n_f32(0.69312179f), p, f);
  p = vfmaq_f32(vdupq_n_f32(0.99999928f), p, f);
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), vshlq_n_s32(vcvtq_s32_f32(n), 23)));
}

inline float32x4_t load_half(const void* from) {
  uint16x4_t h;
  __builtin_memcpy(&h, from, sizeof(h));
  return vcvt_f32_f16(vreinterpret_f16_u16(h));
}

inline uint8x16_t load_bytes(const void* from) {
  return vld1q_u8(static_cast<const uint8_t*>(from));
}

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

// -- look-ups --

struct Table {
  uint8x16x4_t low, high;
};

inline Table load_table(const void* from) {
  const uint8_t* bytes = static_cast<const uint8_t*>(from);
  return {vld1q_u8_x4(bytes), vld1q_u8_x4(bytes + 64)};
}

// What 16 codes need to be looked up in any table.
struct Indices {
  uint8x16_t low, high;  // entry number, and the same less 64; a look-up yields nothing beyond 63
  uint8x16_t negative;   // all ones where the entry counts negated
};

inline Indices indices_of(uint8x16_t codes) {
  const uint8x16_t entry = vandq_u8(codes, vdupq_n_u8(0x7f));
  return {entry, vsubq_u8(entry, vdupq_n_u8(64)), vcltzq_s8(vreinterpretq_s8_u8(codes))};
}

inline uint8x16_t look_up_16(const Table& table, const Indices& x) {
  const uint8x16_t entry = vqtbx4q_u8(vqtbl4q_u8(table.low, x.low), table.high, x.high);
  return vsubq_u8(veorq_u8(entry, x.negative), x.negative);
}

inline float32x4_t low_floats(int16x8_t x) {
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(x)));
}
inline float32x4_t high_floats(int16x8_t x) {
  return vcvtq_f32_s32(vmovl_s16(vget_high_s16(x)));
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

// -- attention from codes --

// The low bytes of eight numbers.
inline uint8x8_t low_bytes(int32x4_t first, int32x4_t second) {
  return vmovn_u16(vcombine_u16(vmovn_u32(vreinterpretq_u32_s32(first)), vmovn_u32(vreinterpretq_u32_s32(second))));
}

float build_luts(const float* q, const int8_t* words, const uint8_t* width, int n_subspaces, bool wide, float* room,
                 uint8_t* luts) {
  float largest = 0, total = 0;
  for (int m = 0; m < n_subspaces; q += width[m], words += width[m] * 128, m++) {
    float32x4_t top = vdupq_n_f32(0);
    for (int i = 0; i < 128; i += 16) {
      float32x4_t sums[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
      for (int j = 0; j < width[m]; j++) {
        const int8x16_t word = vld1q_s8(words + j * 128 + i);
        const int16x8_t low = vmovl_s8(vget_low_s8(word)), high = vmovl_s8(vget_high_s8(word));
        sums[0] = vfmaq_n_f32(sums[0], low_floats(low), q[j]);
        sums[1] = vfmaq_n_f32(sums[1], high_floats(low), q[j]);
        sums[2] = vfmaq_n_f32(sums[2], low_floats(high), q[j]);
        sums[3] = vfmaq_n_f32(sums[3], high_floats(high), q[j]);
      }
      for (int v = 0; v < 4; v++) {
        vst1q_f32(room + m * 128 + i + 4 * v, sums[v]);
        top = vmaxnmq_f32(top, vabsq_f32(sums[v]));
      }
    }
    const float top_one = vmaxvq_f32(top);
    largest = top_one > largest ? top_one : largest;
    total += top_one;
  }
  float step = wide ? total / 32600.0f : largest / 127.0f;
  step = step > 1e-30f ? step : 1e-30f;
  const float inverse = 1.0f / step;
  const int32x4_t c128 = vdupq_n_s32(128), c255 = vdupq_n_s32(255);
  for (int i = 0; i < n_subspaces * 128; i += 8) {
    int32x4_t entry[2], high[2];
    for (int h = 0; h < 2; h++) {
      const float32x4_t x = vmulq_n_f32(vld1q_f32(room + i + 4 * h), inverse);
      entry[h] = high[h] = vcvtnq_s32_f32(vaddq_f32(x, vdupq_n_f32(128.0f)));
      if (!wide) continue;
      // The low byte counts from -127 to 127, so that negating it stays in range: -128 is moved to -127.
      const uint32x4_t lowest = vceqzq_s32(vandq_s32(entry[h], c255));
      entry[h] = vsubq_s32(entry[h], vreinterpretq_s32_u32(lowest));
      const int32x4_t low = vsubq_s32(vandq_s32(entry[h], c255), c128);
      high[h] = vshrq_n_s32(vsubq_s32(vsubq_s32(entry[h], c128), low), 8);
    }
    vst1_u8(luts + i, low_bytes(entry[0], entry[1]));
    if (wide) vst1_u8(luts + n_subspaces * 128 + i, low_bytes(high[0], high[1]));
  }
  return step;
}

// A quarter of a block, 16 codes, for all rows. Bytes are added in 16-bit lanes: `all` takes even and odd bytes
// together, `odd` the odd ones, and the even ones are the difference.
template <int Rows, bool Wide>
inline void look_up_quarter(const uint8_t* luts, const float* steps, int n_subspaces, const uint8_t* block, int quarter,
                            float* scores) {
  const int row_bytes = n_subspaces * 128 * (Wide ? 2 : 1);
  uint16x8_t all[Rows], odd[Rows];
  uint8x16_t high[Rows];
  for (int r = 0; r < Rows; r++) {
    all[r] = odd[r] = vdupq_n_u16(0);
    high[r] = vdupq_n_u8(0);
  }
  for (int m = 0; m < n_subspaces; m++) {
    const Indices x = indices_of(load_bytes(block + m * kLine + 16 * quarter));
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
      const uint8_t* table = luts + r * row_bytes + m * 128;
      const uint16x8_t entry = vreinterpretq_u16_u8(look_up_16(load_table(table), x));
      all[r] = vaddq_u16(all[r], entry);
      odd[r] = vsraq_n_u16(odd[r], entry, 8);
      if (Wide) high[r] = vaddq_u8(high[r], look_up_16(load_table(table + n_subspaces * 128), x));
    }
  }
  const uint8_t* cell_scales = block + n_subspaces * kLine;
  const uint16x8_t offset = vdupq_n_u16(uint16_t(128 * n_subspaces));
  for (int r = 0; r < Rows; r++) {
    uint16x8_t part[2] = {vsubq_u16(all[r], vshlq_n_u16(odd[r], 8)), odd[r]};
    if (Wide) {
      const uint16x8_t both = vreinterpretq_u16_u8(high[r]);
      part[0] = vaddq_u16(part[0], vshlq_n_u16(both, 8));
      part[1] = vaddq_u16(part[1], vandq_u16(both, vdupq_n_u16(0xff00)));
    }
    for (int i = 0; i < 2; i++) {
      const int16x8_t sums = vreinterpretq_s16_u16(vsubq_u16(part[i], offset));
      const int cell = 32 * i + 8 * quarter;
      float* to = scores + r * kSuperblockCells + cell;
      vst1q_f32(to, vmulq_f32(vmulq_n_f32(load_half(cell_scales + 2 * cell), steps[r]), low_floats(sums)));
      vst1q_f32(to + 4, vmulq_f32(vmulq_n_f32(load_half(cell_scales + 2 * cell + 8), steps[r]), high_floats(sums)));
    }
  }
}

inline void ask_for(const Prefetch& prefetch, int b) {
  if (b >= prefetch.n_blocks) return;
  for (int line = 0; line < prefetch.lines; line++) __builtin_prefetch(prefetch.blocks[b] + line * kLine, 0, 2);
}

template <int Rows, bool Wide>
void look_up_rows(const uint8_t* luts, const float* steps, int n_subspaces, const uint8_t* const* blocks, int n_blocks,
                  const Prefetch& prefetch, float* scores) {
  for (int b = 0; b < n_blocks; b++) {
    ask_for(prefetch, b);
    for (int quarter = 0; quarter < 4; quarter++) {
      look_up_quarter<Rows, Wide>(luts, steps, n_subspaces, blocks[b], quarter, scores + b * kLine);
    }
  }
}

void look_up(const uint8_t* luts, const float* steps, int n_rows, int n_subspaces, bool wide,
             const uint8_t* const* blocks, int n_blocks, const Prefetch& prefetch, float* scores) {
  using LookUp = void (*)(const uint8_t*, const float*, int, const uint8_t* const*, int, const Prefetch&, float*);
  static constexpr LookUp kLookUp[2][kRowsAtOnce] = {
      {look_up_rows<1, false>, look_up_rows<2, false>, look_up_rows<3, false>, look_up_rows<4, false>},
      {look_up_rows<1, true>, look_up_rows<2, true>, look_up_rows<3, true>, look_up_rows<4, true>}};
  kLookUp[wide][n_rows - 1](luts, steps, n_subspaces, blocks, n_blocks, prefetch, scores);
}

void value_scales(const uint8_t* const* blocks, int n_blocks, int codes_bytes, float* scales, float* log_scales,
                  uint64_t* bad) {
  const uint32_t bit_of_lane[4] = {1, 2, 4, 8};
  const uint32x4_t lane_bits = vld1q_u32(bit_of_lane);
  for (int b = 0; b < n_blocks; b++) {
    bad[b] = 0;
    for (int i = 0; i < 16; i++) {
      const uint32x4_t bits = vreinterpretq_u32_f32(load_half(blocks[b] + codes_bytes + 8 * i));
      const uint32x4_t exponent = vandq_u32(vshrq_n_u32(bits, 23), vdupq_n_u32(0xff));
      const uint32x4_t not_finite = vceqq_u32(exponent, vdupq_n_u32(0xff));
      bad[b] |= uint64_t(vaddvq_u32(vandq_u32(not_finite, lane_bits))) << (4 * i);
      // log2(2^e (1 + f)) <= e + f + 0.0861
      const uint32x4_t fraction = vorrq_u32(vandq_u32(bits, vdupq_n_u32(0x7fffff)), vdupq_n_u32(0x3f800000));
      const float32x4_t log = vaddq_f32(vcvtq_f32_u32(exponent), vreinterpretq_f32_u32(fraction));
      vst1q_f32(scales + b * kLine + 4 * i, vreinterpretq_f32_u32(vbicq_u32(bits, not_finite)));
      vst1q_f32(log_scales + b * kLine + 4 * i, vaddq_f32(log, vdupq_n_f32(0.0862f - 128)));
    }
  }
}

// Thresholds between -1/2 and 1/2, evenly spread over any stretch of cells (bit-reversed numbers).
struct DitherTable {
  float at[kLine];
  constexpr DitherTable() : at() {
    for (int i = 0; i < kLine; i++) {
      int reversed = 0;
      for (int bit = 0; bit < 6; bit++) reversed |= (i >> bit & 1) << (5 - bit);
      at[i] = (float(reversed) + 0.5f) / 64 - 0.5f;
    }
  }
};
constexpr DitherTable kDither;

// Weights are 16-bit numbers whatever `wide` says, in value order.
float code_weights(const float* scores, int n_blocks, float offset, const float* scales, bool, int row,
                   uint8_t* weights, uint32_t* used) {
  float32x4_t sum = vdupq_n_f32(0);
  *used = 0;
  for (int b = 0; b < n_blocks; b++) {
    int16_t* to = reinterpret_cast<int16_t*>(weights) + row * kSuperblockCells + b * kLine;
    int32x4_t any = vdupq_n_s32(0);
    for (int i = 0; i < 16; i++) {
      const float32x4_t s = vld1q_f32(scores + b * kLine + 4 * i);
      const float32x4_t p = exp2_of(vfmaq_n_f32(vdupq_n_f32(-offset), s, kLog2e));
      sum = vaddq_f32(sum, p);
      const int32x4_t w =
          vcvtnq_s32_f32(vfmaq_f32(vld1q_f32(kDither.at + 4 * i), p, vld1q_f32(scales + b * kLine + 4 * i)));
      any = vorrq_s32(any, w);
      vst1_s16(to + i % 4 * 16 + i / 4 * 4, vqmovn_s32(w));
    }
    *used |= uint32_t(vmaxvq_u32(vreinterpretq_u32_s32(any)) != 0) << b;
  }
  return vaddvq_f32(sum);
}

template <int Rows>
void add_rows(const uint8_t* const* blocks, uint32_t used, const int8_t* words, const ValueGroup* groups, int n_groups,
              const int16_t* weights, const float* shrink, const float* factor, float* sums) {
  for (int g = 0; g < n_groups; g++) {
    const ValueGroup group = groups[g];
    for (int j = 0; j < group.components; j++) {
      const Table table = load_table(words + (group.component + j) * 128);
      const int code_row = j < 2 ? group.code_row : group.code_row2;
      int32x4_t part[Rows];
      for (int r = 0; r < Rows; r++) part[r] = vdupq_n_s32(0);
      for (uint32_t left = used; left; left &= left - 1) {
        const int b = __builtin_ctz(left);
        for (int quarter = 0; quarter < 4; quarter++) {
          const uint8_t* codes = blocks[b] + code_row * kLine + 16 * quarter;
          const int8x16_t word = vreinterpretq_s8_u8(look_up_16(table, indices_of(load_bytes(codes))));
          const int16x8_t first = vmovl_s8(vget_low_s8(word)), second = vmovl_high_s8(word);
#pragma GCC unroll 4
          for (int r = 0; r < Rows; r++) {
            const int16_t* w = weights + r * kSuperblockCells + b * kLine + 16 * quarter;
            const int16x8_t w0 = vld1q_s16(w), w1 = vld1q_s16(w + 8);
            part[r] = vmlal_s16(part[r], vget_low_s16(first), vget_low_s16(w0));
            part[r] = vmlal_high_s16(part[r], first, w0);
            part[r] = vmlal_s16(part[r], vget_low_s16(second), vget_low_s16(w1));
            part[r] = vmlal_high_s16(part[r], second, w1);
          }
        }
      }
      for (int r = 0; r < Rows; r++) {
        float* to = sums + (r * n_groups + g) * 16 + j;
        *to = *to * shrink[r] + factor[r] * float(vaddvq_s32(part[r]));
      }
    }
  }
}

void add_values(const uint8_t* const* blocks, int, uint32_t used, const int8_t* words, const ValueGroup* groups,
                int n_groups, const uint8_t* weights, bool, int n_rows, const float* shrink, const float* factor,
                const Prefetch& prefetch, float* sums) {
  using Add = void (*)(const uint8_t* const*, uint32_t, const int8_t*, const ValueGroup*, int, const int16_t*,
                       const float*, const float*, float*);
  static constexpr Add kAdd[kRowsAtOnce] = {add_rows<1>, add_rows<2>, add_rows<3>, add_rows<4>};
  for (int b = 0; b < prefetch.n_blocks; b++) ask_for(prefetch, b);
  kAdd[n_rows - 1](blocks, used, words, groups, n_groups, reinterpret_cast<const int16_t*>(weights), shrink, factor,
                   sums);
}

constexpr IsaOps kOps{"neon",        {14.98f, 14.98f}, nearest,     times_matrix, hadamard,     decode_keys,
                      decode_values, load_keys,        load_values, multiply,     mask_bits,    finish_scores,
                      exponentiate,  build_luts,       look_up,     value_scales, code_weights, add_values};

}  // namespace

extern const IsaOps* const kNeonOps = &kOps;

}  // namespace thimble
