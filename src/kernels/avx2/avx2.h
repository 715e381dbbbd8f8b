// What the AVX2 units share; they use FMA and F16C too.
//
// A look-up in a table of 128 bytes takes eight shuffles, one for each sixteen entries (a sixteenth). Before each
// further shuffle 16 is subtracted from the entry's number. A shuffle yields 0 where that number is negative, so the
// shuffles behind the entry's own sixteenth yield nothing, but those before it do. Therefore each sixteenth is stored
// as its difference (exclusive or) to the one before, and the exclusive or of all shuffles is the entry.
#pragma once

#include <immintrin.h>

#include "kernels/isa.h"

namespace thimble {
namespace {  // each unit has a copy of its own, compiled with its flags

using Floats = __m256;
using Lanes = __m256i;
using Bytes = __m128i;
constexpr int kLanes = 8, kColumns = 2, kMultiplyRows = 6, kMaxima = 1;

inline Lanes first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Floats all_of(float x) {
  return _mm256_set1_ps(x);
}

inline Floats load(const float* from) {
  return _mm256_loadu_ps(from);
}
inline Floats load(const float* from, Lanes lanes) {
  return _mm256_maskload_ps(from, lanes);
}
inline void store(float* to, Floats x) {
  _mm256_storeu_ps(to, x);
}
inline void store(float* to, Floats x, Lanes lanes) {
  _mm256_maskstore_ps(to, lanes, x);
}

// Masked stores are slow on AMD, even with a full mask.
inline Floats load_lanes(const float* from, int n) {
  return n >= 8 ? load(from) : load(from, first_lanes(n));
}
inline void store_lanes(float* to, Floats x, int n) {
  if (n >= 8) {
    store(to, x);
  } else {
    store(to, x, first_lanes(n));
  }
}

inline Floats load_half(const void* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}
inline Floats load_halves(const uint8_t* from, int n) {
  if (n >= 8) return load_half(from);
  alignas(16) uint16_t room[8] = {};
  __builtin_memcpy(room, from, size_t(n) * 2);
  return load_half(room);
}

inline Floats fused(Floats a, Floats b, Floats c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline Floats magnitude(Floats x) {
  return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}
inline Floats smaller(Floats x, Floats y) {
  return _mm256_min_ps(x, y);
}
inline Floats greater(Floats x, Floats y) {
  return _mm256_max_ps(x, y);
}
inline Floats choose(unsigned bits, Floats x, Floats y) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const Lanes lanes = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), bit), bit);
  return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(lanes));
}
inline unsigned lanes_at_least(Floats x, Floats y) {
  return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_GE_OQ)));
}
inline float max_of(Floats x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline float sum_of(Floats x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// p times the power of 2 whose exponent `shifted` holds in its low bits, 0 where x < -64.
inline Floats times_power(Floats p, Floats shifted, Floats x) {
  const Floats counts = _mm256_cmp_ps(x, all_of(-64.0f), _CMP_NLT_UQ);
  const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
  return _mm256_and_ps(counts, _mm256_castsi256_ps(bits));
}

// The best gain of each lane so far, and the first codeword of the vector that it came from.
struct Best {
  Floats gain = all_of(kUnseen);
  __m256i first = _mm256_setzero_si256();
};

inline void keep_better(Floats gain, int first, Best& best) {
  const Floats better = _mm256_cmp_ps(gain, best.gain, _CMP_GT_OQ);
  best.gain = _mm256_blendv_ps(best.gain, gain, better);
  best.first = _mm256_blendv_epi8(best.first, _mm256_set1_epi32(first), _mm256_castps_si256(better));
}

inline int lowest_best(const Best& best) {
  const int equal = _mm256_movemask_ps(_mm256_cmp_ps(best.gain, all_of(max_of(best.gain)), _CMP_EQ_OQ));
  alignas(32) int first[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(first), best.first);
  int index = 127;
  for (int lane = 0; lane < 8; lane++) {
    if (equal >> lane & 1 && first[lane] + lane < index) index = first[lane] + lane;
  }
  return index;
}

template <int Half>
inline Floats butterfly(Floats x) {
  Floats other;
  if constexpr (Half == 1) other = _mm256_permute_ps(x, 0xb1);
  if constexpr (Half == 2) other = _mm256_permute_ps(x, 0x4e);
  if constexpr (Half == 4) other = _mm256_permute2f128_ps(x, x, 0x01);
  constexpr int kUpper = Half == 1 ? 0xaa : Half == 2 ? 0xcc : 0xf0;
  return _mm256_blend_ps(_mm256_add_ps(x, other), _mm256_sub_ps(other, x), kUpper);
}

inline void transpose(Floats r[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {  // lane l of u[i + j]: column 4 l + j of rows i to i + 3
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int j = 0; j < 4; j++) {
    r[j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
    r[4 + j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
  }
}

inline Bytes zip_low(Bytes a, Bytes b) {
  return _mm_unpacklo_epi8(a, b);
}
inline Bytes zip_high(Bytes a, Bytes b) {
  return _mm_unpackhi_epi8(a, b);
}

inline __m256i load_bytes(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

// 32 codes, split into codeword and sign.
struct Codes {
  __m256i entry;  // 0 to 127
  __m256i sign;   // negative where the code negates the entry, never 0
};

inline Codes codes_of(__m256i bytes) {
  return {_mm256_and_si256(bytes, _mm256_set1_epi8(0x7f)), _mm256_or_si256(bytes, _mm256_set1_epi8(1))};
}

// Sixteenth i of a table, in both lanes.
inline __m256i load_sixteenth(const void* table, int i) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(table) + i));
}

// A table whose sixteenths are differences, as described above.
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

// Forces the compiler to compute x here. GCC 12 would otherwise run all shuffles of a look-up before it combines any,
// and spill registers.
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

// -- 16-bit numbers (word_loops.h) --

using Ints = __m256i;

inline Ints load_pairs(const int16_t* from) {
  return load_bytes(from);
}
inline Ints pair_everywhere(const int16_t* from) {
  int pair;
  __builtin_memcpy(&pair, from, sizeof(pair));
  return _mm256_set1_epi32(pair);
}
inline void add_pair_products(Ints& sums, Ints a, Ints b) {
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
  settle(sums);  // else GCC 12 multiplies far ahead, and keeps half of the sums on the stack
}
inline Floats to_floats(Ints x) {
  return _mm256_cvtepi32_ps(x);
}
inline void store_words(int16_t* to, Floats x) {
  const __m256i whole = _mm256_cvtps_epi32(x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
}

}  // namespace
}  // namespace thimble
