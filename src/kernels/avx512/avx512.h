// What the AVX-512 units share. They need VBMI, whose byte permute looks up a table of 128 entries in two registers,
// and VNNI, which adds up products of bytes: Ice Lake, Zen 4 and later.
#pragma once

#include <immintrin.h>

#include "kernels/isa.h"

namespace thimble {
namespace {  // each unit has a copy of its own, compiled with its flags

using Floats = __m512;
using Lanes = __mmask16;
using Bytes = __m512i;
constexpr int kLanes = 16, kColumns = 4, kMultiplyRows = 6, kMaxima = 4;

inline Lanes first_lanes(int n) {
  return n >= 16 ? Lanes(0xffff) : Lanes((1u << n) - 1);
}
inline Floats all_of(float x) {
  return _mm512_set1_ps(x);
}

inline Floats load(const float* from) {
  return _mm512_loadu_ps(from);
}
inline Floats load(const float* from, Lanes lanes) {
  return _mm512_maskz_loadu_ps(lanes, from);
}
inline Floats load_lanes(const float* from, int n) {
  return load(from, first_lanes(n));
}
inline Floats load_half(const void* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
inline Floats load_halves(const void* from, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), from));
}
inline void store(float* to, Floats x) {
  _mm512_storeu_ps(to, x);
}
inline void store(float* to, Floats x, Lanes lanes) {
  _mm512_mask_storeu_ps(to, lanes, x);
}
inline void store_lanes(float* to, Floats x, int n) {
  store(to, x, first_lanes(n));
}

inline Floats fused(Floats a, Floats b, Floats c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline Floats magnitude(Floats x) {
  return _mm512_abs_ps(x);
}
inline Floats smaller(Floats x, Floats y) {
  return _mm512_min_ps(x, y);
}
inline Floats greater(Floats x, Floats y) {
  return _mm512_max_ps(x, y);
}
inline Floats choose(unsigned bits, Floats x, Floats y) {
  return _mm512_mask_mov_ps(y, Lanes(bits), x);
}
inline unsigned lanes_at_least(Floats x, Floats y) {
  return _mm512_cmp_ps_mask(x, y, _CMP_GE_OQ);
}
inline float max_of(Floats x) {
  return _mm512_reduce_max_ps(x);
}
inline float sum_of(Floats x) {
  return _mm512_reduce_add_ps(x);
}

// p times the power of 2 whose exponent `shifted` holds in its low bits, 0 where x < -64.
inline Floats times_power(Floats p, Floats shifted, Floats x) {
  const Lanes counts = _mm512_cmp_ps_mask(x, all_of(-64.0f), _CMP_NLT_UQ);
  return _mm512_castsi512_ps(
      _mm512_maskz_add_epi32(counts, _mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
}

// The best gain of each lane so far, and the first codeword of the vector that it came from.
struct Best {
  Floats gain = all_of(kUnseen);
  __m512i first = _mm512_setzero_si512();
};

inline void keep_better(Floats gain, int first, Best& best) {
  const Lanes better = _mm512_cmp_ps_mask(gain, best.gain, _CMP_GT_OQ);
  best.gain = _mm512_mask_mov_ps(best.gain, better, gain);
  best.first = _mm512_mask_mov_epi32(best.first, better, _mm512_set1_epi32(first));
}

inline int lowest_best(const Best& best) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const Lanes equal = _mm512_cmp_ps_mask(best.gain, all_of(max_of(best.gain)), _CMP_EQ_OQ);
  return int(_mm512_mask_reduce_min_epu32(equal, _mm512_add_epi32(best.first, lane)) & 127);
}

template <int Half>
inline Floats butterfly(Floats x) {
  Floats other;
  if constexpr (Half == 1) other = _mm512_permute_ps(x, 0xb1);
  if constexpr (Half == 2) other = _mm512_permute_ps(x, 0x4e);
  if constexpr (Half == 4) other = _mm512_shuffle_f32x4(x, x, 0xb1);
  if constexpr (Half == 8) other = _mm512_shuffle_f32x4(x, x, 0x4e);
  constexpr Lanes upper = Half == 1 ? 0xaaaa : Half == 2 ? 0xcccc : Half == 4 ? 0xf0f0 : 0xff00;
  return _mm512_mask_sub_ps(_mm512_add_ps(x, other), upper, other, x);
}

inline void transpose(Floats r[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // lane l of r[i + j] becomes column 4 l + j of rows i to i + 3
    const auto low = [&](int a, int b) {
      return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[a]), _mm512_castps_pd(t[b])));
    };
    const auto high = [&](int a, int b) {
      return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[a]), _mm512_castps_pd(t[b])));
    };
    r[i] = low(i, i + 2);
    r[i + 1] = high(i, i + 2);
    r[i + 2] = low(i + 1, i + 3);
    r[i + 3] = high(i + 1, i + 3);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m512 even = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), odd = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88),
                 odd2 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(even, even2, 0x88);
    t[4 + j] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(even, even2, 0xdd);
    t[12 + j] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = t[i];
}

inline Bytes zip_low(Bytes a, Bytes b) {
  return _mm512_unpacklo_epi8(a, b);
}
inline Bytes zip_high(Bytes a, Bytes b) {
  return _mm512_unpackhi_epi8(a, b);
}

struct Table {
  __m512i low, high;
};

inline Table load_table(const void* from) {
  return {_mm512_loadu_si512(from), _mm512_loadu_si512(static_cast<const uint8_t*>(from) + kLine)};
}

// Looks up 64 codes. `negative` has the highest bit of each code, which negates the entry. A table that holds 128 + x
// yields 128 - x for a negated code, modulo 256.
inline __m512i look_up_64(Table table, __m512i code, __mmask64 negative) {
  const __m512i entry = _mm512_permutex2var_epi8(table.low, code, table.high);
  return _mm512_mask_sub_epi8(entry, negative, _mm512_setzero_si512(), entry);
}

// -- 16-bit numbers (word_loops.h) --

using Ints = __m512i;

inline Ints load_pairs(const int16_t* from) {
  return _mm512_loadu_si512(from);
}
inline Ints pair_everywhere(const int16_t* from) {
  int pair;
  __builtin_memcpy(&pair, from, sizeof(pair));
  return _mm512_set1_epi32(pair);
}
// In place, since GCC 12 copies the sums before and after the intrinsic.
inline void add_pair_products(Ints& sums, Ints a, Ints b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
}
inline Floats to_floats(Ints x) {
  return _mm512_cvtepi32_ps(x);
}
inline void store_words(int16_t* to, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
}

}  // namespace
}  // namespace thimble
