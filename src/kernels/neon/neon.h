// What the NEON units share, for every 64-bit Arm: tables of 64 bytes in four registers, so a codebook's 128 entries
// take two look-ups.
#pragma once

#include <arm_neon.h>

#include "kernels/isa.h"

namespace thimble {
namespace {  // a copy to each unit, compiled with its flags

constexpr float kLog2e = 1.44269504f;
constexpr float kHidden = -__builtin_inff();
constexpr int kLine = 64;  // cells to a block

// 2^x, relative error 3e-6; 0 for x < -64, as weight_of has it. NaN stays NaN.
inline float32x4_t exp2_of(float32x4_t x) {
  const uint32x4_t vanishes = vcltq_f32(x, vdupq_n_f32(-64.0f));
  const float32x4_t n = vrndnq_f32(x);
  const float32x4_t f = vsubq_f32(x, n);
  float32x4_t p = vfmaq_f32(vdupq_n_f32(0.055917859f), f, vdupq_n_f32(0.0095701023f));
  p = vfmaq_f32(vdupq_n_f32(0.24024744f), p, f);
  p = vfmaq_f32(vdupq_n_f32(0.69312179f), p, f);
  p = vfmaq_f32(vdupq_n_f32(0.99999928f), p, f);
  const int32x4_t bits = vaddq_s32(vreinterpretq_s32_f32(p), vshlq_n_s32(vcvtq_s32_f32(n), 23));
  return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_s32(bits), vanishes));
}

inline float32x4_t load_half(const void* from) {
  uint16x4_t h;
  __builtin_memcpy(&h, from, sizeof(h));
  return vcvt_f32_f16(vreinterpret_f16_u16(h));
}

inline uint8x16_t load_bytes(const void* from) {
  return vld1q_u8(static_cast<const uint8_t*>(from));
}

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

}  // namespace
}  // namespace thimble
