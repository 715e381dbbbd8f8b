// What the AVX-512 units share. They need VBMI (byte permutes over 128 entries: a whole table of codewords in two
// registers) and VNNI (sums of byte products): Ice Lake, Zen 4 and later.
#pragma once

#include <immintrin.h>

#include "kernels/isa.h"

namespace thimble {
namespace {  // a copy to each unit, compiled with its flags

constexpr float kLog2e = 1.44269504f;
constexpr float kHidden = -__builtin_inff();
constexpr int kLine = 64;  // cells to a block, bytes to a register

inline __mmask16 first_lanes(int n) {
  return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1);
}

// 2^x, relative error 3e-6; 0 for x < -64, as weight_of has it. NaN stays NaN.
inline __m512 exp2_of(__m512 x) {
  const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-64.0f), _CMP_NLT_UQ);
  const __m512 magic = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in low bits
  const __m512 shifted = _mm512_add_ps(x, magic);
  const __m512 f = _mm512_sub_ps(x, _mm512_sub_ps(shifted, magic));
  __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.0095701023f), _mm512_set1_ps(0.055917859f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24024744f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69312179f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99999928f));
  return _mm512_castsi512_ps(
      _mm512_maskz_add_epi32(counts, _mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
}

inline __m512 load_half(const void* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}

struct Table {
  __m512i low, high;
};

inline Table load_table(const void* from) {
  return {_mm512_loadu_si512(from), _mm512_loadu_si512(static_cast<const uint8_t*>(from) + kLine)};
}

// 64 look-ups; the top bit of a code, gathered in `negative`, says that the entry counts negated. Tables that hold
// 128 + x yield 128 - x then, modulo 256.
inline __m512i look_up_64(Table table, __m512i code, __mmask64 negative) {
  const __m512i entry = _mm512_permutex2var_epi8(table.low, code, table.high);
  return _mm512_mask_sub_epi8(entry, negative, _mm512_setzero_si512(), entry);
}

}  // namespace
}  // namespace thimble
