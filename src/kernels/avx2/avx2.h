// What the AVX2 units share; they use FMA and F16C too.
//
// A table of 128 bytes is eight shuffles of 16 entries. A shuffle yields 0 where its control is negative: taking 16
// from an entry's number before each further shuffle silences those past its own sixteenth, but not those before it. So
// each sixteenth holds its difference (exclusive or) to the one before, and the differences up to an entry's own add up
// to it.
#pragma once

#include <immintrin.h>

#include "kernels/isa.h"

namespace thimble {
namespace {  // a copy to each unit, compiled with its flags

constexpr float kLog2e = 1.44269504f;
constexpr float kHidden = -__builtin_inff();
constexpr int kLine = 64;  // cells to a block

inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// Eight floats, or the first n where there are fewer. AMD takes long over a masked store, whatever its mask.
inline __m256 load_lanes(const float* from, int n) {
  return n >= 8 ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, first_lanes(n));
}

inline void store_lanes(float* to, __m256 x, int n) {
  if (n >= 8) {
    _mm256_storeu_ps(to, x);
  } else {
    _mm256_maskstore_ps(to, first_lanes(n), x);
  }
}

inline __m256i lanes_of_bits(unsigned bits) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), bit), bit);
}

// 2^x, relative error 3e-6; 0 for x < -64, as weight_of has it. NaN stays NaN.
inline __m256 exp2_of(__m256 x) {
  const __m256 counts = _mm256_cmp_ps(x, _mm256_set1_ps(-64.0f), _CMP_NLT_UQ);
  const __m256 magic = _mm256_set1_ps(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in low bits
  const __m256 shifted = _mm256_add_ps(x, magic);
  const __m256 f = _mm256_sub_ps(x, _mm256_sub_ps(shifted, magic));
  __m256 p = _mm256_fmadd_ps(f, _mm256_set1_ps(0.0095701023f), _mm256_set1_ps(0.055917859f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.24024744f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.69312179f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.99999928f));
  const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
  return _mm256_and_ps(counts, _mm256_castsi256_ps(bits));
}

inline __m256 load_half(const void* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}

inline __m256i load_bytes(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

inline float max_of(__m256 x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

inline float sum_of(__m256 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline __m256 magnitude(__m256 x) {
  return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}

// 32 codes, taken apart.
struct Codes {
  __m256i entry;  // 0 to 127
  __m256i sign;   // negative where the entry counts negated, never 0
};

inline Codes codes_of(__m256i bytes) {
  return {_mm256_and_si256(bytes, _mm256_set1_epi8(0x7f)), _mm256_or_si256(bytes, _mm256_set1_epi8(1))};
}

// A sixteenth of a table, in both lanes.
inline __m256i load_sixteenth(const void* table, int i) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(table) + i));
}

// A table as differences.
struct Table {
  __m256i sixteenth[8];
};

inline Table load_table(const void* plain) {
  Table table;
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    const __m256i x = load_sixteenth(plain, i);
    table.sixteenth[i] = i == 0 ? x : _mm256_xor_si256(x, load_sixteenth(plain, i - 1));
  }
  return table;
}

// Makes x be computed here: GCC 12 would put off what adds up the shuffles of a look-up until all of them are there,
// and run out of registers.
inline void settle(__m256i& x) {
  asm volatile("" : "+x"(x));
}

inline __m256i look_up_32(const Table& table, const Codes& codes) {
  __m256i found = _mm256_shuffle_epi8(table.sixteenth[0], codes.entry), entry = codes.entry;
#pragma GCC unroll 7
  for (int i = 1; i < 8; i++) {
    entry = _mm256_sub_epi8(entry, _mm256_set1_epi8(16));
    settle(entry);
    found = _mm256_xor_si256(found, _mm256_shuffle_epi8(table.sixteenth[i], entry));
    settle(found);
  }
  return _mm256_sign_epi8(found, codes.sign);
}

}  // namespace
}  // namespace thimble
