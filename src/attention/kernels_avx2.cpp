// AVX2 with FMA and F16C. A table of 128 bytes is eight shuffles of 16 entries; the indices that make a shuffle yield 0
// outside its sixteenth of the table are worked out once for all tables that a row of codes is looked up in.
#include <immintrin.h>

#include "attention/isa.h"

namespace thimble {
namespace {

constexpr float kLog2e = 1.44269504f;
constexpr float kHidden = -__builtin_inff();
constexpr int kLine = 64;  // cells to a block

inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline __m256i lanes_of_bits(unsigned bits) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), bit), bit);
}

// 2^x for x >= -126 (below, 2^-126), relative error 3e-6. NaN stays NaN: max returns its second operand then.
inline __m256 exp2_of(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-126.0f), x);
  const __m256 magic = _mm256_set1_ps(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in low bits
  const __m256 shifted = _mm256_add_ps(x, magic);
  const __m256 f = _mm256_sub_ps(x, _mm256_sub_ps(shifted, magic));
  __m256 p = _mm256_fmadd_ps(f, _mm256_set1_ps(0.0095701023f), _mm256_set1_ps(0.055917859f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.24024744f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.69312179f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.99999928f));
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
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

// -- codec --

void nearest(const float* y, float inverse_rms, const float* words, const float* half_norms, int width, int n_subspaces,
             uint8_t* codes) {
  for (int m = 0; m < n_subspaces; m++, y += width, words += width * 128, half_norms += 128) {
    alignas(32) float all_dots[128];
    __m256 best_gain = _mm256_set1_ps(kHidden);
    __m256i best = _mm256_setzero_si256();
    for (int half = 0; half < 128; half += 64) {
      __m256 dots[8];
      for (__m256& dot : dots) dot = _mm256_setzero_ps();
      for (int j = 0; j < width; j++) {
        const __m256 z = _mm256_set1_ps(y[j] * inverse_rms);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
          dots[i] = _mm256_add_ps(dots[i], _mm256_mul_ps(z, _mm256_loadu_ps(words + j * 128 + half + 8 * i)));
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        const int first = half + 8 * i;
        _mm256_store_ps(all_dots + first, dots[i]);
        const __m256 gain = _mm256_sub_ps(magnitude(dots[i]), _mm256_loadu_ps(half_norms + first));
        const __m256 better = _mm256_cmp_ps(gain, best_gain, _CMP_GT_OQ);
        best_gain = _mm256_blendv_ps(best_gain, gain, better);
        best = _mm256_blendv_epi8(best, _mm256_set1_epi32(first), _mm256_castps_si256(better));
      }
    }
    // The lowest index among the lanes that reach the top.
    const int equal = _mm256_movemask_ps(_mm256_cmp_ps(best_gain, _mm256_set1_ps(max_of(best_gain)), _CMP_EQ_OQ));
    alignas(32) int first[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(first), best);
    int index = 127;
    for (int lane = 0; lane < 8; lane++) {
      if (equal >> lane & 1 && first[lane] + lane < index) index = first[lane] + lane;
    }
    codes[m] = uint8_t(index | (all_dots[index] < 0 ? 0x80 : 0));
  }
}

template <int Rows, int Columns, bool Fused>
inline void multiply_tile(const float* a, int a_stride, const float* b, int b_stride, int k, __m256i last, float* c,
                          int c_stride, bool add) {
  __m256 sums[Rows][Columns];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 2
    for (int j = 0; j < Columns; j++) {
      const float* from = c + r * c_stride + 8 * j;
      sums[r][j] = !add ? _mm256_setzero_ps() : Columns == 1 ? _mm256_maskload_ps(from, last) : _mm256_loadu_ps(from);
    }
  }
  for (int i = 0; i < k; i++) {
    __m256 row[Columns];
#pragma GCC unroll 2
    for (int j = 0; j < Columns; j++) {
      const float* from = b + i * b_stride + 8 * j;
      row[j] = Columns == 1 ? _mm256_maskload_ps(from, last) : _mm256_loadu_ps(from);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) {
      const __m256 x = _mm256_set1_ps(a[r * a_stride + i]);
#pragma GCC unroll 2
      for (int j = 0; j < Columns; j++) {
        sums[r][j] =
            Fused ? _mm256_fmadd_ps(x, row[j], sums[r][j]) : _mm256_add_ps(sums[r][j], _mm256_mul_ps(x, row[j]));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 2
    for (int j = 0; j < Columns; j++) {
      float* to = c + r * c_stride + 8 * j;
      if (Columns == 1) {
        _mm256_maskstore_ps(to, last, sums[r][j]);
      } else {
        _mm256_storeu_ps(to, sums[r][j]);
      }
    }
  }
}

template <int Rows, bool Fused>
void multiply_rows(const float* a, int a_stride, const float* b, int b_stride, int k, int n, float* c, int c_stride,
                   bool add) {
  int j = 0;
  for (; n - j >= 16; j += 16) {
    multiply_tile<Rows, 2, Fused>(a, a_stride, b + j, b_stride, k, first_lanes(8), c + j, c_stride, add);
  }
  for (; j < n; j += 8) {
    multiply_tile<Rows, 1, Fused>(a, a_stride, b + j, b_stride, k, first_lanes(n - j), c + j, c_stride, add);
  }
}

template <bool Fused>
void multiply_all(const float* a, int a_stride, const float* b, int b_stride, int rows, int k, int n, float* c,
                  int c_stride, bool add) {
  int r = 0;
  for (; rows - r >= 6; r += 6) {
    multiply_rows<6, Fused>(a + r * a_stride, a_stride, b, b_stride, k, n, c + r * c_stride, c_stride, add);
  }
  for (; rows - r >= 3; r += 3) {
    multiply_rows<3, Fused>(a + r * a_stride, a_stride, b, b_stride, k, n, c + r * c_stride, c_stride, add);
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

template <int Half>
inline __m256 butterfly(__m256 x) {
  __m256 other;
  if constexpr (Half == 1) other = _mm256_permute_ps(x, 0xb1);
  if constexpr (Half == 2) other = _mm256_permute_ps(x, 0x4e);
  if constexpr (Half == 4) other = _mm256_permute2f128_ps(x, x, 0x01);
  constexpr int kUpper = Half == 1 ? 0xaa : Half == 2 ? 0xcc : 0xf0;
  return _mm256_blend_ps(_mm256_add_ps(x, other), _mm256_sub_ps(other, x), kUpper);
}

void hadamard(float* x, int n, int block, float norm) {
  for (int i = 0; i < n; i += 8) {
    const __m256i lanes = first_lanes(n - i);
    __m256 v = _mm256_maskload_ps(x + i, lanes);
    if (block > 1) v = butterfly<1>(v);
    if (block > 2) v = butterfly<2>(v);
    if (block > 4) v = butterfly<4>(v);
    if (block <= 8) v = _mm256_mul_ps(v, _mm256_set1_ps(norm));
    _mm256_maskstore_ps(x + i, lanes, v);
  }
  for (int half = 8; half < block; half *= 2) {
    const __m256 scale = _mm256_set1_ps(half * 2 < block ? 1.0f : norm);
    for (int i = 0; i < n; i += 2 * half) {
      for (int j = i; j < i + half; j += 8) {
        const __m256 a = _mm256_loadu_ps(x + j), b = _mm256_loadu_ps(x + j + half);
        _mm256_storeu_ps(x + j, _mm256_mul_ps(_mm256_add_ps(a, b), scale));
        _mm256_storeu_ps(x + j + half, _mm256_mul_ps(_mm256_sub_ps(a, b), scale));
      }
    }
  }
}

// -- look-ups --

// What 32 codes need to be looked up in any table.
struct Indices {
  __m256i sixteenth[8];  // shuffle controls: entry number, or top bit set where the code lies in another sixteenth
  __m256i negative;      // all ones where the entry counts negated
};

inline Indices indices_of(__m256i codes) {
  Indices x;
  const __m256i entry = _mm256_and_si256(codes, _mm256_set1_epi8(0x7f));
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    x.sixteenth[i] = _mm256_adds_epu8(_mm256_xor_si256(entry, _mm256_set1_epi8(char(16 * i))), _mm256_set1_epi8(0x70));
  }
  x.negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), codes);
  return x;
}

inline __m256i look_up_32(const void* table, const Indices& x) {
  const __m128i* sixteenths = static_cast<const __m128i*>(table);
  __m256i found[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    found[i] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(sixteenths + i)), x.sixteenth[i]);
  }
  const __m256i a = _mm256_or_si256(_mm256_or_si256(found[0], found[1]), _mm256_or_si256(found[2], found[3]));
  const __m256i b = _mm256_or_si256(_mm256_or_si256(found[4], found[5]), _mm256_or_si256(found[6], found[7]));
  return _mm256_sub_epi8(_mm256_xor_si256(_mm256_or_si256(a, b), x.negative), x.negative);
}

// -- tiles --

void decode_keys(const uint8_t* block, const uint8_t* cell_scales, const int8_t* words, const uint8_t* code_row,
                 const float* scale, int dim, float* tile) {
  __m256 cells[8];
  for (int i = 0; i < 8; i++) cells[i] = load_half(cell_scales + 16 * i);
  Indices x[2];
  for (int d = 0; d < dim; d++) {
    if (d == 0 || code_row[d] != code_row[d - 1]) {
      for (int h = 0; h < 2; h++) x[h] = indices_of(load_bytes(block + code_row[d] * kLine + 32 * h));
    }
    const __m256 component = _mm256_set1_ps(scale[d]);
    for (int h = 0; h < 2; h++) {
      const __m256i bytes = look_up_32(words + d * 128, x[h]);
      // Even bytes are cells from 16 h on, odd bytes those 32 further.
      const __m256i part[2] = {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
      for (int odd = 0; odd < 2; odd++) {
        for (int i = 0; i < 2; i++) {
          const __m128i words16 = i ? _mm256_extracti128_si256(part[odd], 1) : _mm256_castsi256_si128(part[odd]);
          const int vector = 4 * odd + 2 * h + i;
          const __m256 word = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(words16)), component);
          _mm256_storeu_ps(tile + d * kLine + 8 * vector, _mm256_mul_ps(cells[vector], word));
        }
      }
    }
  }
}

// 16 rows of 16 bytes become columns. With the row number and the column number written as one number of 8 bits, each
// step rotates it by one bit; four steps exchange the two.
inline void transpose_bytes(__m128i r[16]) {
#pragma GCC unroll 4
  for (int step = 0; step < 4; step++) {
    __m128i s[16];
    for (int i = 0; i < 16; i++) s[i] = r[i];
    for (int i = 0; i < 8; i++) {
      r[2 * i] = _mm_unpacklo_epi8(s[i], s[i + 8]);
      r[2 * i + 1] = _mm_unpackhi_epi8(s[i], s[i + 8]);
    }
  }
}

void decode_values(const uint8_t* block, const uint8_t* cell_scales, const int8_t* words, const uint8_t* code_row,
                   const float* scale, int dim, float* tile) {
  alignas(32) float cells[kLine];
  for (int i = 0; i < 8; i++) _mm256_store_ps(cells + 8 * i, load_half(cell_scales + 16 * i));
  for (int d = 0; d < dim; d += 16) {
    const int n = dim - d < 16 ? dim - d : 16;
    alignas(32) int8_t bytes[16][kLine] = {};
    for (int i = 0; i < n; i++) {
      for (int h = 0; h < 2; h++) {
        const Indices x = indices_of(load_bytes(block + code_row[d + i] * kLine + 32 * h));
        _mm256_store_si256(reinterpret_cast<__m256i*>(bytes[i] + 32 * h), look_up_32(words + (d + i) * 128, x));
      }
    }
    for (int quarter = 0; quarter < 4; quarter++) {
      __m128i r[16];
      for (int i = 0; i < 16; i++) r[i] = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes[i] + 16 * quarter));
      transpose_bytes(r);
      for (int i = 0; i < 16; i++) {
        const int cell = i / 4 * 16 + quarter * 4 + i % 4;  // the one whose value_position is 16 * quarter + i
        for (int j = 0; j < n; j += 8) {
          const __m256i lanes = first_lanes(n - j);
          const __m256 component = _mm256_maskload_ps(scale + d + j, lanes);
          const __m128i word = j ? _mm_srli_si128(r[i], 8) : r[i];
          const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(word)), component);
          _mm256_maskstore_ps(tile + cell * dim + d + j, lanes, _mm256_mul_ps(value, _mm256_set1_ps(cells[cell])));
        }
      }
    }
  }
}

inline void transpose_floats(__m256 r[8]) {
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

// Eight halves, fewer at the end of a row.
inline __m256 load_halves(const uint8_t* from, int n) {
  if (n >= 8) return load_half(from);
  alignas(16) uint16_t room[8] = {};
  __builtin_memcpy(room, from, size_t(n) * 2);
  return load_half(room);
}

void load_keys(const uint8_t* const* rows, int n, int dim, float* tile) {
  for (int cell = 0; cell < kLine; cell += 8) {
    for (int d = 0; d < dim; d += 8) {
      __m256 r[8];
      for (int i = 0; i < 8; i++) {
        r[i] = cell + i < n ? load_halves(rows[cell + i] + 2 * d, dim - d) : _mm256_setzero_ps();
      }
      transpose_floats(r);
      for (int i = 0; i < 8 && d + i < dim; i++) _mm256_storeu_ps(tile + (d + i) * kLine + cell, r[i]);
    }
  }
}

void load_values(const uint8_t* const* rows, int n, int dim, float* tile) {
  for (int cell = 0; cell < n; cell++) {
    for (int d = 0; d < dim; d += 8) {
      _mm256_maskstore_ps(tile + cell * dim + d, first_lanes(dim - d), load_halves(rows[cell] + 2 * d, dim - d));
    }
  }
}

// -- softmax --

MaskBits mask_bits(const uint16_t* mask) {
  uint64_t hidden = 0, zero = 0;
  const auto bits = [](__m256i low, __m256i high) {
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8);
    return uint64_t(unsigned(_mm256_movemask_epi8(bytes)));
  };
  for (int h = 0; h < 2; h++) {
    const __m256i a = load_bytes(mask + 32 * h), b = load_bytes(mask + 32 * h + 16);
    const __m256i infinity = _mm256_set1_epi16(short(0xfc00));
    hidden |= bits(_mm256_cmpeq_epi16(a, infinity), _mm256_cmpeq_epi16(b, infinity)) << (32 * h);
    const auto is_zero = [](__m256i x) { return _mm256_cmpeq_epi16(_mm256_slli_epi16(x, 1), _mm256_setzero_si256()); };
    zero |= bits(is_zero(a), is_zero(b)) << (32 * h);
  }
  return {~hidden, (~hidden & ~zero) != 0};
}

// x is natural; tanh(x) = 1 - 2 / (e^2x + 1)
inline __m256 tanh_of(__m256 x) {
  const __m256 limit = _mm256_set1_ps(20.0f), one = _mm256_set1_ps(1.0f);
  const __m256 e = exp2_of(_mm256_mul_ps(_mm256_min_ps(limit, x), _mm256_set1_ps(2 * kLog2e)));
  return _mm256_sub_ps(one, _mm256_div_ps(_mm256_set1_ps(2.0f), _mm256_add_ps(e, one)));
}

template <bool Softcap, bool Masked, bool Weighted>
float finish(float* scores, int n_blocks, const uint64_t* visible, const uint16_t* const* masks, float bias,
             float slope, float softcap, const float* log_weight, float* max_log) {
  const __m256 hidden = _mm256_set1_ps(kHidden), cap = _mm256_set1_ps(softcap);
  const __m256 inverse_cap = _mm256_set1_ps(Softcap ? 1.0f / softcap : 0.0f);
  __m256 top = hidden, top_log = hidden;
  for (int b = 0; b < n_blocks; b++) {
    for (int i = 0; i < 8; i++) {
      float* at = scores + b * kLine + 8 * i;
      __m256 s = _mm256_add_ps(_mm256_loadu_ps(at), _mm256_set1_ps(bias));
      if (Softcap) s = _mm256_mul_ps(cap, tanh_of(_mm256_mul_ps(s, inverse_cap)));
      if (Masked) s = _mm256_fmadd_ps(load_half(masks[b] + 8 * i), _mm256_set1_ps(slope), s);
      const __m256i lanes = lanes_of_bits(unsigned(visible[b] >> (8 * i)) & 0xff);
      s = _mm256_blendv_ps(hidden, s, _mm256_castsi256_ps(lanes));
      _mm256_storeu_ps(at, s);
      top = _mm256_max_ps(s, top);  // a NaN s leaves top
      if (Weighted) {
        const __m256 log = _mm256_fmadd_ps(s, _mm256_set1_ps(kLog2e), _mm256_loadu_ps(log_weight + b * kLine + 8 * i));
        top_log = _mm256_max_ps(log, top_log);
      }
    }
  }
  if (Weighted) *max_log = max_of(top_log);
  return max_of(top);
}

float finish_scores(float* scores, int n_blocks, const uint64_t* visible, const uint16_t* const* masks, float bias,
                    float slope, float softcap, const float* log_weight, float* max_log) {
  using Finish =
      float (*)(float*, int, const uint64_t*, const uint16_t* const*, float, float, float, const float*, float*);
  static constexpr Finish kFinish[8] = {
      finish<false, false, false>, finish<false, false, true>, finish<false, true, false>, finish<false, true, true>,
      finish<true, false, false>,  finish<true, false, true>,  finish<true, true, false>,  finish<true, true, true>};
  return kFinish[(softcap != 0) * 4 + (masks != nullptr) * 2 + (log_weight != nullptr)](
      scores, n_blocks, visible, masks, bias, slope, softcap, log_weight, max_log);
}

float exponentiate(float* scores, int n_cells, float max) {
  __m256 sum = _mm256_setzero_ps();
  for (int i = 0; i < n_cells; i += 8) {
    const __m256 x = _mm256_sub_ps(_mm256_loadu_ps(scores + i), _mm256_set1_ps(max));
    const __m256 p = exp2_of(_mm256_mul_ps(x, _mm256_set1_ps(kLog2e)));
    _mm256_storeu_ps(scores + i, p);
    sum = _mm256_add_ps(sum, p);
  }
  return sum_of(sum);
}

// -- attention from codes --

// The low bytes of 16 numbers that fit 16 bits.
inline __m128i low_bytes(__m256i first, __m256i second) {
  const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
  const __m256i bytes = _mm256_and_si256(both, _mm256_set1_epi16(255));
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi16(bytes, bytes), 0xd8));
}

float build_luts(const float* q, const int8_t* words, const uint8_t* width, int n_subspaces, bool wide, float* room,
                 uint8_t* luts) {
  float largest = 0, total = 0;
  for (int m = 0; m < n_subspaces; q += width[m], words += width[m] * 128, m++) {
    __m256 top = _mm256_setzero_ps();
    for (int half = 0; half < 128; half += 64) {
      __m256 sums[8];
      for (__m256& s : sums) s = _mm256_setzero_ps();
      for (int j = 0; j < width[m]; j++) {
        const __m256 x = _mm256_set1_ps(q[j]);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
          const __m128i word = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(words + j * 128 + half + 8 * i));
          sums[i] = _mm256_fmadd_ps(x, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(word)), sums[i]);
        }
      }
      for (int i = 0; i < 8; i++) {
        _mm256_storeu_ps(room + m * 128 + half + 8 * i, sums[i]);
        top = _mm256_max_ps(top, magnitude(sums[i]));
      }
    }
    const float top_one = max_of(top);
    largest = top_one > largest ? top_one : largest;
    total += top_one;
  }
  float step = wide ? total / 32600.0f : largest / 127.0f;
  step = step > 1e-30f ? step : 1e-30f;
  const __m256 inverse = _mm256_set1_ps(1.0f / step), offset = _mm256_set1_ps(128.0f);
  const __m256i c128 = _mm256_set1_epi32(128), c255 = _mm256_set1_epi32(255);
  for (int i = 0; i < n_subspaces * 128; i += 16) {
    __m256i entry[2], high[2];
    for (int h = 0; h < 2; h++) {
      const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(room + i + 8 * h), inverse);
      entry[h] = _mm256_cvtps_epi32(_mm256_add_ps(x, offset));
      if (!wide) continue;
      // The low byte counts from -127 to 127, so that negating it stays in range: -128 is moved to -127.
      const __m256i lowest = _mm256_cmpeq_epi32(_mm256_and_si256(entry[h], c255), _mm256_setzero_si256());
      entry[h] = _mm256_sub_epi32(entry[h], lowest);
      const __m256i low = _mm256_sub_epi32(_mm256_and_si256(entry[h], c255), c128);
      high[h] = _mm256_srai_epi32(_mm256_sub_epi32(_mm256_sub_epi32(entry[h], c128), low), 8);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(luts + i), low_bytes(entry[0], entry[1]));
    if (wide) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(luts + n_subspaces * 128 + i), low_bytes(high[0], high[1]));
    }
  }
  return step;
}

inline void ask_for(const uint8_t* line) {
  _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1);
}

// Half a block, 32 codes. Bytes are added in 16-bit lanes: `all` takes even and odd bytes together, `odd` the odd ones,
// and the even ones are the difference.
template <int Rows, bool Wide>
inline void look_up_half(const uint8_t* luts, const float* steps, int n_subspaces, const uint8_t* block, int h,
                         const uint8_t* ahead, int ahead_lines, float* scores) {
  const int row_bytes = n_subspaces * 128 * (Wide ? 2 : 1);
  __m256i all[Rows], odd[Rows], high[Rows];
  for (int r = 0; r < Rows; r++) all[r] = odd[r] = high[r] = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (int m = 0; m < n_subspaces; m++) {
    if (m < ahead_lines) ask_for(ahead + m * kLine);
    const Indices x = indices_of(load_bytes(block + m * kLine + 32 * h));
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
      const __m256i entry = look_up_32(luts + r * row_bytes + m * 128, x);
      all[r] = _mm256_add_epi16(all[r], entry);
      odd[r] = _mm256_add_epi16(odd[r], _mm256_srli_epi16(entry, 8));
      if (Wide) high[r] = _mm256_add_epi8(high[r], look_up_32(luts + r * row_bytes + (n_subspaces + m) * 128, x));
    }
  }
  const uint8_t* cell_scales = block + n_subspaces * kLine;
  const __m256i offset = _mm256_set1_epi16(short(128 * n_subspaces));
  for (int r = 0; r < Rows; r++) {
    __m256i part[2] = {_mm256_sub_epi16(all[r], _mm256_slli_epi16(odd[r], 8)), odd[r]};
    if (Wide) {
      part[0] = _mm256_add_epi16(part[0], _mm256_slli_epi16(high[r], 8));
      part[1] = _mm256_add_epi16(part[1], _mm256_and_si256(high[r], _mm256_set1_epi16(short(0xff00))));
    }
    for (int i = 0; i < 4; i++) {
      const __m256i sums = _mm256_sub_epi16(part[i / 2], offset);
      const __m128i eight = i % 2 ? _mm256_extracti128_si256(sums, 1) : _mm256_castsi256_si128(sums);
      const int cell = 32 * (i / 2) + 16 * h + 8 * (i % 2);
      const __m256 scale = _mm256_mul_ps(load_half(cell_scales + 2 * cell), _mm256_set1_ps(steps[r]));
      _mm256_storeu_ps(scores + r * kSuperblockCells + cell,
                       _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(eight))));
    }
  }
}

template <int Rows, bool Wide>
void look_up_rows(const uint8_t* luts, const float* steps, int n_subspaces, const uint8_t* const* blocks, int n_blocks,
                  const Prefetch& prefetch, float* scores) {
  for (int b = 0; b < n_blocks; b++) {
    const bool asks = b < prefetch.n_blocks;
    for (int m = n_subspaces; asks && m < prefetch.lines; m++) ask_for(prefetch.blocks[b] + m * kLine);
    for (int h = 0; h < 2; h++) {
      look_up_half<Rows, Wide>(luts, steps, n_subspaces, blocks[b], h, asks ? prefetch.blocks[b] : nullptr,
                               asks && h == 0 ? prefetch.lines : 0, scores + b * kLine);
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
  const __m256i exponent_mask = _mm256_set1_epi32(0xff), one = _mm256_set1_epi32(0x3f800000);
  for (int b = 0; b < n_blocks; b++) {
    bad[b] = 0;
    for (int i = 0; i < 8; i++) {
      const __m256i bits = _mm256_castps_si256(load_half(blocks[b] + codes_bytes + 16 * i));
      const __m256i exponent = _mm256_and_si256(_mm256_srli_epi32(bits, 23), exponent_mask);
      const __m256i not_finite = _mm256_cmpeq_epi32(exponent, exponent_mask);
      bad[b] |= uint64_t(unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(not_finite)))) << (8 * i);
      // log2(2^e (1 + f)) <= e + f + 0.0861
      const __m256i fraction = _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffff)), one);
      const __m256 log = _mm256_add_ps(_mm256_cvtepi32_ps(exponent), _mm256_castsi256_ps(fraction));
      _mm256_storeu_ps(scales + b * kLine + 8 * i, _mm256_castsi256_ps(_mm256_andnot_si256(not_finite, bits)));
      _mm256_storeu_ps(log_scales + b * kLine + 8 * i, _mm256_add_ps(log, _mm256_set1_ps(0.0862f - 128)));
    }
  }
}

// Thresholds between -1/2 and 1/2, evenly spread over any stretch of cells (bit-reversed numbers).
struct DitherTable {
  alignas(32) float at[kLine];
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
  __m256 sum = _mm256_setzero_ps();
  *used = 0;
  for (int b = 0; b < n_blocks; b++) {
    __m256i w[8];
    for (int i = 0; i < 8; i++) {
      const __m256 s = _mm256_loadu_ps(scores + b * kLine + 8 * i);
      const __m256 p = exp2_of(_mm256_fmsub_ps(s, _mm256_set1_ps(kLog2e), _mm256_set1_ps(offset)));
      sum = _mm256_add_ps(sum, p);
      w[i] = _mm256_cvtps_epi32(
          _mm256_fmadd_ps(p, _mm256_loadu_ps(scales + b * kLine + 8 * i), _mm256_load_ps(kDither.at + 8 * i)));
    }
    __m256i any = _mm256_setzero_si256();
    __m256i* to = reinterpret_cast<__m256i*>(weights + (row * kSuperblockCells + b * kLine) * 2);
    for (int i = 0; i < 2; i++) {  // w[2 k + i] holds cells 16 k + 8 i on, four to each quarter of the block
      const __m256i first = _mm256_packs_epi32(w[i], w[2 + i]), second = _mm256_packs_epi32(w[4 + i], w[6 + i]);
      _mm256_storeu_si256(to + 2 * i, _mm256_permute2x128_si256(first, second, 0x20));
      _mm256_storeu_si256(to + 2 * i + 1, _mm256_permute2x128_si256(first, second, 0x31));
      any = _mm256_or_si256(any, _mm256_or_si256(first, second));
    }
    *used |= uint32_t(!_mm256_testz_si256(any, any)) << b;
  }
  return sum_of(sum);
}

template <int Rows>
void add_rows(const uint8_t* const* blocks, uint32_t used, const int8_t* words, const ValueGroup* groups, int n_groups,
              const uint8_t* weights, const float* shrink, const float* factor, const Prefetch& prefetch, float* sums) {
  for (int g = 0; g < n_groups; g++) {
    const ValueGroup group = groups[g];
    for (int b = 0; g < prefetch.lines && b < prefetch.n_blocks; b++) ask_for(prefetch.blocks[b] + g * kLine);
    __m256i part[Rows][4];
    for (int r = 0; r < Rows; r++) {
      for (int j = 0; j < 4; j++) part[r][j] = _mm256_setzero_si256();
    }
    for (uint32_t left = used; left; left &= left - 1) {
      const int b = __builtin_ctz(left);
      for (int h = 0; h < 2; h++) {
        const uint8_t* w = weights + (b * kLine + 32 * h) * 2;
        Indices x = indices_of(load_bytes(blocks[b] + group.code_row * kLine + 32 * h));
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          if (j >= group.components) break;
          if (j == 2 && group.code_row2 != group.code_row) {
            x = indices_of(load_bytes(blocks[b] + group.code_row2 * kLine + 32 * h));
          }
          const __m256i word = look_up_32(words + (group.component + j) * 128, x);
          const __m256i first = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(word));
          const __m256i second = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(word, 1));
#pragma GCC unroll 4
          for (int r = 0; r < Rows; r++) {
            const __m256i products =
                _mm256_add_epi32(_mm256_madd_epi16(first, load_bytes(w + r * kSuperblockCells * 2)),
                                 _mm256_madd_epi16(second, load_bytes(w + r * kSuperblockCells * 2 + 32)));
            part[r][j] = _mm256_add_epi32(part[r][j], products);
          }
        }
      }
    }
    for (int r = 0; r < Rows; r++) {
      // Four sums of four, the upper half of each register added to its lower one.
      const __m256i ab = _mm256_hadd_epi32(part[r][0], part[r][1]), cd = _mm256_hadd_epi32(part[r][2], part[r][3]);
      const __m256i abcd = _mm256_hadd_epi32(ab, cd);
      const __m128i total = _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
      float* to = sums + (r * n_groups + g) * 16;
      const __m128 old = _mm_mul_ps(_mm_loadu_ps(to), _mm_set1_ps(shrink[r]));
      _mm_storeu_ps(to, _mm_fmadd_ps(_mm_cvtepi32_ps(total), _mm_set1_ps(factor[r]), old));
    }
  }
  for (int line = n_groups; line < prefetch.lines; line++) {
    for (int b = 0; b < prefetch.n_blocks; b++) ask_for(prefetch.blocks[b] + line * kLine);
  }
}

void add_values(const uint8_t* const* blocks, int, uint32_t used, const int8_t* words, const ValueGroup* groups,
                int n_groups, const uint8_t* weights, bool, int n_rows, const float* shrink, const float* factor,
                const Prefetch& prefetch, float* sums) {
  using Add = void (*)(const uint8_t* const*, uint32_t, const int8_t*, const ValueGroup*, int, const uint8_t*,
                       const float*, const float*, const Prefetch&, float*);
  static constexpr Add kAdd[kRowsAtOnce] = {add_rows<1>, add_rows<2>, add_rows<3>, add_rows<4>};
  kAdd[n_rows - 1](blocks, used, words, groups, n_groups, weights, shrink, factor, prefetch, sums);
}

constexpr IsaOps kOps{"avx2",        {14.98f, 14.98f}, nearest,     times_matrix, hadamard,     decode_keys,
                      decode_values, load_keys,        load_values, multiply,     mask_bits,    finish_scores,
                      exponentiate,  build_luts,       look_up,     value_scales, code_weights, add_values};

}  // namespace

extern const IsaOps* const kAvx2Ops = &kOps;

}  // namespace thimble
