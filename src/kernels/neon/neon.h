// What the NEON units share, for every 64-bit Arm. A look-up instruction reads a table of 64 bytes in four registers,
// so a table of 128 entries takes two.
#pragma once

#include <arm_neon.h>

#include "kernels/isa.h"

namespace thimble {
namespace {  // each unit has a copy of its own, compiled with its flags

using Floats = float32x4_t;
using Lanes = int;  // their number, as NEON has no masks
using Bytes = uint8x16_t;
constexpr int kLanes = 4, kColumns = 4, kMultiplyRows = 4, kMaxima = 1;

inline Lanes first_lanes(int n) {
  return n;
}
inline Floats all_of(float x) {
  return vdupq_n_f32(x);
}

inline Floats load(const float* from) {
  return vld1q_f32(from);
}
inline Floats load_lanes(const float* from, int n) {
  if (n >= 4) return load(from);
  float room[4] = {};
  for (int i = 0; i < n; i++) room[i] = from[i];
  return load(room);
}
inline Floats load(const float* from, Lanes n) {
  return load_lanes(from, n);
}
inline void store(float* to, Floats x) {
  vst1q_f32(to, x);
}
inline void store_lanes(float* to, Floats x, int n) {
  if (n >= 4) return store(to, x);
  float room[4];
  store(room, x);
  for (int i = 0; i < n; i++) to[i] = room[i];
}
inline void store(float* to, Floats x, Lanes n) {
  store_lanes(to, x, n);
}

inline Floats load_half(const void* from) {
  uint16x4_t h;
  __builtin_memcpy(&h, from, sizeof(h));
  return vcvt_f32_f16(vreinterpret_f16_u16(h));
}
inline Floats load_halves(const uint8_t* from, int n) {
  if (n >= 4) return load_half(from);
  uint16_t room[4] = {};
  __builtin_memcpy(room, from, 2 * unsigned(n));
  return load_half(room);
}

inline Floats fused(Floats a, Floats b, Floats c) {
  return vfmaq_f32(c, a, b);
}
inline Floats magnitude(Floats x) {
  return vabsq_f32(x);
}
inline Floats smaller(Floats x, Floats y) {
  return vminq_f32(x, y);
}
inline Floats greater(Floats x, Floats y) {
  return vmaxnmq_f32(x, y);
}
inline Floats choose(unsigned bits, Floats x, Floats y) {
  const int32_t bit_of_lane[4] = {1, 2, 4, 8};
  return vbslq_f32(vtstq_s32(vdupq_n_s32(int32_t(bits)), vld1q_s32(bit_of_lane)), x, y);
}
inline unsigned lanes_at_least(Floats x, Floats y) {
  const uint32_t bit_of_lane[4] = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(vcgeq_f32(x, y), vld1q_u32(bit_of_lane)));
}
inline float max_of(Floats x) {
  return vmaxnmvq_f32(x);
}
inline float sum_of(Floats x) {
  return vaddvq_f32(x);
}

// p times the power of 2 whose exponent `shifted` holds in its low bits, 0 where x < -64.
inline Floats times_power(Floats p, Floats shifted, Floats x) {
  const uint32x4_t vanishes = vcltq_f32(x, all_of(-64.0f));
  const uint32x4_t bits = vaddq_u32(vreinterpretq_u32_f32(p), vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23));
  return vreinterpretq_f32_u32(vbicq_u32(bits, vanishes));
}

// The best gain of each lane so far, and the first codeword of the vector that it came from.
struct Best {
  Floats gain = all_of(kUnseen);
  int32x4_t first = vdupq_n_s32(0);
};

inline void keep_better(Floats gain, int first, Best& best) {
  const uint32x4_t better = vcgtq_f32(gain, best.gain);
  best.gain = vbslq_f32(better, gain, best.gain);
  best.first = vbslq_s32(better, vdupq_n_s32(first), best.first);
}

inline int lowest_best(const Best& best) {
  const uint32x4_t equal = vceqq_f32(best.gain, vdupq_n_f32(vmaxvq_f32(best.gain)));
  const int32_t lanes[4] = {0, 1, 2, 3};
  return vminvq_s32(vbslq_s32(equal, vaddq_s32(best.first, vld1q_s32(lanes)), vdupq_n_s32(127)));
}

template <int Half>
inline Floats butterfly(Floats x) {
  const uint32_t upper_lanes[4] = {0, Half == 1 ? ~0u : 0, Half == 2 ? ~0u : 0, ~0u};
  const Floats other = Half == 1 ? vrev64q_f32(x) : vextq_f32(x, x, 2);
  return vbslq_f32(vld1q_u32(upper_lanes), other - x, x + other);
}

inline void transpose(Floats r[4]) {
  const float32x4x2_t a = vtrnq_f32(r[0], r[1]), b = vtrnq_f32(r[2], r[3]);
  r[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
  r[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
  r[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
  r[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

inline Bytes zip_low(Bytes a, Bytes b) {
  return vzip1q_u8(a, b);
}
inline Bytes zip_high(Bytes a, Bytes b) {
  return vzip2q_u8(a, b);
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

// 16 codes, prepared for look-ups in any table.
struct Indices {
  uint8x16_t low, high;  // entry number, and the same less 64; a look-up of a number above 63 yields nothing
  uint8x16_t negative;   // all ones where the code negates the entry
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
