// NEON: attention from codes.
#include "kernels/neon/neon.h"
#include "kernels/vector/code_loops.h"

namespace thimble {
namespace {

// The low bytes of eight numbers.
inline uint8x8_t low_bytes(int32x4_t first, int32x4_t second) {
  return vmovn_u16(vcombine_u16(vmovn_u32(vreinterpretq_u32_s32(first)), vmovn_u32(vreinterpretq_u32_s32(second))));
}

// 128 bytes for each subspace, which hold 128 + q.codeword / step. Where `wide`, these are the low bytes, and 128 more
// for each subspace hold the high bytes.
size_t lut_bytes(int, int n_subspaces, bool wide) {
  return size_t(n_subspaces) * 128 * (wide ? 2 : 1);
}

float build_luts(const float* q, const int8_t* words, const uint8_t* width, int n_subspaces, bool wide, float* room,
                 uint8_t* luts) {
  float largest = 0, total = 0;
  for (int m = 0; m < n_subspaces; q += width[m], words += width[m] * 128, m++) {
    float32x4_t greatest = vdupq_n_f32(0);
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
        greatest = vmaxnmq_f32(greatest, vabsq_f32(sums[v]));
      }
    }
    const float greatest_one = vmaxvq_f32(greatest);
    largest = greatest_one > largest ? greatest_one : largest;
    total += greatest_one;
  }
  // Rounding, and the change to low bytes below, add at most 2 to an entry, so sums fit 16 bits.
  float step = wide ? total / (32767.0f - 2.0f * n_subspaces) : largest / 127.0f;
  step = step > 1e-30f ? step : 1e-30f;
  const float inverse = 1.0f / step;
  const int32x4_t c128 = vdupq_n_s32(128), c255 = vdupq_n_s32(255);
  for (int i = 0; i < n_subspaces * 128; i += 8) {
    int32x4_t entry[2], high[2];
    for (int h = 0; h < 2; h++) {
      const float32x4_t x = vmulq_n_f32(vld1q_f32(room + i + 4 * h), inverse);
      entry[h] = high[h] = vcvtnq_s32_f32(vaddq_f32(x, vdupq_n_f32(128.0f)));
      if (!wide) continue;
      // The low byte must be -127 to 127, so that it can be negated: -128 becomes -127.
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

// Writes the scores of all rows for a quarter of a block, 16 cells. Bytes are added in 16-bit lanes: `all` has the sum
// of even bytes + 256 * odd bytes, `odd` that of the odd bytes, and the even bytes' sum is the difference.
template <int Rows, bool Wide>
inline void look_up_quarter(const uint8_t* luts, const float* steps, int n_subspaces, bool of_values,
                            const uint8_t* block, int quarter, float* scores, size_t stride) {
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
    for (uint16x8_t& sums : part) sums = vsubq_u16(sums, offset);
    // Eight adjacent cells of keys, twice four of values.
    const uint16x8_t ordered[2] = {of_values ? vzip1q_u16(part[0], part[1]) : part[0],
                                   of_values ? vzip2q_u16(part[0], part[1]) : part[1]};
    for (int i = 0; i < 2; i++) {
      const int16x8_t sums = vreinterpretq_s16_u16(ordered[i]);
      const int low = of_values ? 32 * i + 4 * quarter : 32 * i + 8 * quarter, high = low + (of_values ? 16 : 4);
      float* to = scores + r * stride;
      vst1q_f32(to + low, vmulq_f32(vmulq_n_f32(load_half(cell_scales + 2 * low), steps[r]), low_floats(sums)));
      vst1q_f32(to + high, vmulq_f32(vmulq_n_f32(load_half(cell_scales + 2 * high), steps[r]), high_floats(sums)));
    }
  }
}

inline void ask_for(const Prefetch& prefetch, int b) {
  if (b >= prefetch.n_blocks) return;
  for (int line = 0; line < prefetch.lines; line++) __builtin_prefetch(prefetch.blocks[b] + line * kLine, 0, 2);
}

template <int Rows, bool Wide>
void look_up_rows(const uint8_t* luts, const float* steps, int n_subspaces, bool of_values,
                  const uint8_t* const* blocks, int n_blocks, const Prefetch& prefetch, float* scores, size_t stride) {
  for (int b = 0; b < n_blocks; b++) {
    ask_for(prefetch, b);
    for (int quarter = 0; quarter < 4; quarter++) {
      look_up_quarter<Rows, Wide>(luts, steps, n_subspaces, of_values, blocks[b], quarter, scores + b * kLine, stride);
    }
  }
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
        // The four sums are added as floats: as integers their sum might overflow 32 bits.
        *to = *to * shrink[r] + factor[r] * vaddvq_f32(vcvtq_f32_s32(part[r]));
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

}  // namespace

const CodeOps kNeonCodeOps{{14.98f, 14.98f}, lut_bytes, build_luts, look_up, value_scales, code_weights, add_values};

}  // namespace thimble
