// AVX-512 with VBMI (byte permutes over 128 entries: a whole table of codewords in two registers) and VNNI (sums of
// byte products). Ice Lake, Zen 4 and later.
#include <immintrin.h>

#include "attention/isa.h"

namespace thimble {
namespace {

constexpr float kLog2e = 1.44269504f;
constexpr float kHidden = -__builtin_inff();
constexpr int kLine = 64;  // cells to a block, bytes to a register

inline __mmask16 first_lanes(int n) {
  return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1);
}

// 2^x for x >= -126 (below, 2^-126), relative error 3e-6. NaN stays NaN: max returns its second operand then.
inline __m512 exp2_of(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
  const __m512 magic = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in low bits
  const __m512 shifted = _mm512_add_ps(x, magic);
  const __m512 f = _mm512_sub_ps(x, _mm512_sub_ps(shifted, magic));
  __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.0095701023f), _mm512_set1_ps(0.055917859f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24024744f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69312179f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99999928f));
  return _mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
}

inline __m512 load_half(const void* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}

// -- codec --

void nearest(const float* y, float inverse_rms, const float* words, const float* half_norms, int width, int n_subspaces,
             uint8_t* codes) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int m = 0; m < n_subspaces; m++, y += width, words += width * 128, half_norms += 128) {
    __m512 dots[8];
    for (__m512& dot : dots) dot = _mm512_setzero_ps();
    for (int j = 0; j < width; j++) {
      const __m512 z = _mm512_set1_ps(y[j] * inverse_rms);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        dots[i] = _mm512_add_ps(dots[i], _mm512_mul_ps(z, _mm512_loadu_ps(words + j * 128 + 16 * i)));
      }
    }
    alignas(64) float all_dots[128];
    __m512 best_gain = _mm512_set1_ps(kHidden);
    __m512i best = lane;
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      _mm512_store_ps(all_dots + 16 * i, dots[i]);
      const __m512 gain = _mm512_sub_ps(_mm512_abs_ps(dots[i]), _mm512_loadu_ps(half_norms + 16 * i));
      const __mmask16 better = _mm512_cmp_ps_mask(gain, best_gain, _CMP_GT_OQ);
      best_gain = _mm512_mask_mov_ps(best_gain, better, gain);
      best = _mm512_mask_add_epi32(best, better, lane, _mm512_set1_epi32(16 * i));
    }
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(best_gain));
    const __mmask16 equal = _mm512_cmp_ps_mask(best_gain, top, _CMP_EQ_OQ);
    const unsigned index = _mm512_mask_reduce_min_epu32(equal, best) & 127;
    codes[m] = uint8_t(index | (all_dots[index] < 0 ? 0x80 : 0));
  }
}

// Vectors of 16 columns, `Columns` of them at a time, for `Rows` rows: one load of the matrix serves all rows.
template <int Rows, int Columns, bool Fused>
inline void multiply_tile(const float* a, int a_stride, const float* b, int b_stride, int k, __mmask16 last, float* c,
                          int c_stride, bool add) {
  __m512 sums[Rows][Columns];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 4
    for (int j = 0; j < Columns; j++) {
      const __mmask16 lanes = j == Columns - 1 ? last : __mmask16(0xffff);
      sums[r][j] = add ? _mm512_maskz_loadu_ps(lanes, c + r * c_stride + 16 * j) : _mm512_setzero_ps();
    }
  }
  for (int i = 0; i < k; i++) {
    __m512 row[Columns];
#pragma GCC unroll 4
    for (int j = 0; j < Columns; j++) {
      row[j] = j == Columns - 1 ? _mm512_maskz_loadu_ps(last, b + i * b_stride + 16 * j)
                                : _mm512_loadu_ps(b + i * b_stride + 16 * j);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) {
      const __m512 x = _mm512_set1_ps(a[r * a_stride + i]);
#pragma GCC unroll 4
      for (int j = 0; j < Columns; j++) {
        sums[r][j] =
            Fused ? _mm512_fmadd_ps(x, row[j], sums[r][j]) : _mm512_add_ps(sums[r][j], _mm512_mul_ps(x, row[j]));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 4
    for (int j = 0; j < Columns; j++) {
      _mm512_mask_storeu_ps(c + r * c_stride + 16 * j, j == Columns - 1 ? last : __mmask16(0xffff), sums[r][j]);
    }
  }
}

template <int Rows, bool Fused>
void multiply_rows(const float* a, int a_stride, const float* b, int b_stride, int k, int n, float* c, int c_stride,
                   bool add) {
  int j = 0;
  for (; n - j >= 64; j += 64) {
    multiply_tile<Rows, 4, Fused>(a, a_stride, b + j, b_stride, k, 0xffff, c + j, c_stride, add);
  }
  for (; j < n; j += 16) {
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
inline __m512 butterfly(__m512 x) {
  __m512 other;
  if constexpr (Half == 1) other = _mm512_permute_ps(x, 0xb1);
  if constexpr (Half == 2) other = _mm512_permute_ps(x, 0x4e);
  if constexpr (Half == 4) other = _mm512_shuffle_f32x4(x, x, 0xb1);
  if constexpr (Half == 8) other = _mm512_shuffle_f32x4(x, x, 0x4e);
  constexpr __mmask16 upper = Half == 1 ? 0xaaaa : Half == 2 ? 0xcccc : Half == 4 ? 0xf0f0 : 0xff00;
  return _mm512_mask_sub_ps(_mm512_add_ps(x, other), upper, other, x);
}

void hadamard(float* x, int n, int block, float norm) {
  for (int i = 0; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i);
    __m512 v = _mm512_maskz_loadu_ps(lanes, x + i);
    if (block > 1) v = butterfly<1>(v);
    if (block > 2) v = butterfly<2>(v);
    if (block > 4) v = butterfly<4>(v);
    if (block > 8) v = butterfly<8>(v);
    if (block <= 16) v = _mm512_mul_ps(v, _mm512_set1_ps(norm));
    _mm512_mask_storeu_ps(x + i, lanes, v);
  }
  for (int half = 16; half < block; half *= 2) {
    const __m512 scale = _mm512_set1_ps(half * 2 < block ? 1.0f : norm);
    for (int i = 0; i < n; i += 2 * half) {
      for (int j = i; j < i + half; j += 16) {
        const __m512 a = _mm512_loadu_ps(x + j), b = _mm512_loadu_ps(x + j + half);
        _mm512_storeu_ps(x + j, _mm512_mul_ps(_mm512_add_ps(a, b), scale));
        _mm512_storeu_ps(x + j + half, _mm512_mul_ps(_mm512_sub_ps(a, b), scale));
      }
    }
  }
}

// -- tiles --

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

// Bytes in key order as four vectors of 16 cells in order.
inline void widen_keys(__m512i bytes, __m512 out[4]) {
  const __m512i first = _mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8), second = _mm512_srai_epi16(bytes, 8);
  out[0] = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(first)));
  out[1] = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(first, 1)));
  out[2] = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(second)));
  out[3] = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(second, 1)));
}

inline __m512i decoded(const uint8_t* block, const int8_t* words, const uint8_t* code_row, int component) {
  const __m512i code = _mm512_loadu_si512(block + code_row[component] * kLine);
  return look_up_64(load_table(words + component * 128), code, _mm512_movepi8_mask(code));
}

void decode_keys(const uint8_t* block, const uint8_t* cell_scales, const int8_t* words, const uint8_t* code_row,
                 const float* scale, int dim, float* tile) {
  __m512 cells[4], word[4];
  for (int i = 0; i < 4; i++) cells[i] = load_half(cell_scales + 32 * i);
  for (int d = 0; d < dim; d++) {
    widen_keys(decoded(block, words, code_row, d), word);
    for (int i = 0; i < 4; i++) {
      _mm512_storeu_ps(tile + d * kLine + 16 * i,
                       _mm512_mul_ps(cells[i], _mm512_mul_ps(word[i], _mm512_set1_ps(scale[d]))));
    }
  }
}

// 16 rows of 16 bytes become columns, in each 128-bit lane by itself. With the row number and the column number written
// as one number of 8 bits, each step rotates it by one bit; four steps exchange the two.
inline void transpose_bytes(__m512i r[16]) {
#pragma GCC unroll 4
  for (int step = 0; step < 4; step++) {
    __m512i s[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) s[i] = r[i];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      r[2 * i] = _mm512_unpacklo_epi8(s[i], s[i + 8]);
      r[2 * i + 1] = _mm512_unpackhi_epi8(s[i], s[i + 8]);
    }
  }
}

void decode_values(const uint8_t* block, const uint8_t* cell_scales, const int8_t* words, const uint8_t* code_row,
                   const float* scale, int dim, float* tile) {
  alignas(64) float cells[kLine];
  for (int i = 0; i < 4; i++) _mm512_store_ps(cells + 16 * i, load_half(cell_scales + 32 * i));
  for (int d = 0; d < dim; d += 16) {
    const int n = dim - d < 16 ? dim - d : 16;
    __m512i bytes[16];
    for (int i = 0; i < 16; i++) bytes[i] = i < n ? decoded(block, words, code_row, d + i) : _mm512_setzero_si512();
    transpose_bytes(bytes);
    const __mmask16 lanes = first_lanes(n);
    const __m512 scales = _mm512_maskz_loadu_ps(lanes, scale + d);
    for (int i = 0; i < 16; i++) {
      alignas(64) int8_t quarters[kLine];
      _mm512_store_si512(quarters, bytes[i]);
      for (int lane = 0; lane < 4; lane++) {
        const int cell = i / 4 * 16 + lane * 4 + i % 4;  // the one whose value_position is 16 * lane + i
        const __m128i row = _mm_load_si128(reinterpret_cast<const __m128i*>(quarters + 16 * lane));
        const __m512 word = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(row)), scales);
        _mm512_mask_storeu_ps(tile + cell * dim + d, lanes, _mm512_mul_ps(word, _mm512_set1_ps(cells[cell])));
      }
    }
  }
}

inline void transpose_floats(__m512 r[16]) {
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

void load_keys(const uint8_t* const* rows, int n, int dim, float* tile) {
  for (int cell = 0; cell < kLine; cell += 16) {
    for (int d = 0; d < dim; d += 16) {
      const __mmask16 lanes = first_lanes(dim - d);
      __m512 r[16];
      for (int i = 0; i < 16; i++) {
        r[i] = cell + i < n ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, rows[cell + i] + 2 * d))
                            : _mm512_setzero_ps();
      }
      transpose_floats(r);
      for (int i = 0; i < 16 && d + i < dim; i++) _mm512_storeu_ps(tile + (d + i) * kLine + cell, r[i]);
    }
  }
}

void load_values(const uint8_t* const* rows, int n, int dim, float* tile) {
  for (int cell = 0; cell < n; cell++) {
    for (int d = 0; d < dim; d += 16) {
      const __mmask16 lanes = first_lanes(dim - d);
      _mm512_mask_storeu_ps(tile + cell * dim + d, lanes,
                            _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, rows[cell] + 2 * d)));
    }
  }
}

// -- softmax --

MaskBits mask_bits(const uint16_t* mask) {
  const __m512i low = _mm512_loadu_si512(mask), high = _mm512_loadu_si512(mask + 32);
  const __m512i hidden = _mm512_set1_epi16(short(0xfc00)), magnitude = _mm512_set1_epi16(0x7fff);
  const uint64_t visible = _mm512_cmpneq_epi16_mask(low, hidden) | uint64_t(_mm512_cmpneq_epi16_mask(high, hidden))
                                                                       << 32;
  const uint64_t not_zero = _mm512_test_epi16_mask(low, magnitude) | uint64_t(_mm512_test_epi16_mask(high, magnitude))
                                                                         << 32;
  return {visible, (visible & not_zero) != 0};
}

// x is natural; tanh(x) = 1 - 2 / (e^2x + 1)
inline __m512 tanh_of(__m512 x) {
  const __m512 limit = _mm512_set1_ps(20.0f), one = _mm512_set1_ps(1.0f);
  const __m512 e = exp2_of(_mm512_mul_ps(_mm512_min_ps(limit, x), _mm512_set1_ps(2 * kLog2e)));
  return _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, one)));
}

template <bool Softcap, bool Masked, bool Weighted>
float finish(float* scores, int n_blocks, const uint64_t* visible, const uint16_t* const* masks, float bias,
             float slope, float softcap, const float* log_weight, float* max_log) {
  const __m512 hidden = _mm512_set1_ps(kHidden), cap = _mm512_set1_ps(softcap);
  const __m512 inverse_cap = _mm512_set1_ps(Softcap ? 1.0f / softcap : 0.0f);
  __m512 top[4], top_log[4];
  for (int i = 0; i < 4; i++) top[i] = top_log[i] = hidden;
  for (int b = 0; b < n_blocks; b++) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      float* at = scores + b * kLine + 16 * i;
      __m512 s = _mm512_add_ps(_mm512_loadu_ps(at), _mm512_set1_ps(bias));
      if (Softcap) s = _mm512_mul_ps(cap, tanh_of(_mm512_mul_ps(s, inverse_cap)));
      if (Masked) s = _mm512_fmadd_ps(load_half(masks[b] + 16 * i), _mm512_set1_ps(slope), s);
      s = _mm512_mask_mov_ps(hidden, __mmask16(visible[b] >> (16 * i)), s);
      _mm512_storeu_ps(at, s);
      top[i] = _mm512_max_ps(s, top[i]);  // a NaN s leaves top
      if (Weighted) {
        const __m512 log = _mm512_fmadd_ps(s, _mm512_set1_ps(kLog2e), _mm512_loadu_ps(log_weight + b * kLine + 16 * i));
        top_log[i] = _mm512_max_ps(log, top_log[i]);
      }
    }
  }
  if (Weighted) {
    *max_log = _mm512_reduce_max_ps(
        _mm512_max_ps(_mm512_max_ps(top_log[0], top_log[1]), _mm512_max_ps(top_log[2], top_log[3])));
  }
  return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3])));
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
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < n_cells; i += 16) {
    const __m512 x = _mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(max));
    const __m512 p = exp2_of(_mm512_mul_ps(x, _mm512_set1_ps(kLog2e)));
    _mm512_storeu_ps(scores + i, p);
    sum = _mm512_add_ps(sum, p);
  }
  return _mm512_reduce_add_ps(sum);
}

// -- attention from codes --

float build_luts(const float* q, const int8_t* words, const uint8_t* width, int n_subspaces, bool wide, float* room,
                 uint8_t* luts) {
  float* tops = room + n_subspaces * 128;
  float largest = 0, total = 0;
  for (int m = 0; m < n_subspaces; q += width[m], words += width[m] * 128, m++) {
    __m512 sums[8];
    for (__m512& s : sums) s = _mm512_setzero_ps();
    for (int j = 0; j < width[m]; j++) {
      const __m512 x = _mm512_set1_ps(q[j]);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        const __m128i word = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words + j * 128 + 16 * i));
        sums[i] = _mm512_fmadd_ps(x, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(word)), sums[i]);
      }
    }
    __m512 top = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      _mm512_storeu_ps(room + m * 128 + 16 * i, sums[i]);
      top = _mm512_max_ps(top, _mm512_abs_ps(sums[i]));
    }
    tops[m] = _mm512_reduce_max_ps(top);
    largest = tops[m] > largest ? tops[m] : largest;
    total += tops[m];
  }
  float step = wide ? total / 32600.0f : largest / 127.0f;
  step = step > 1e-30f ? step : 1e-30f;
  const __m512 inverse = _mm512_set1_ps(1.0f / step), offset = _mm512_set1_ps(128.0f);
  const __m512i c128 = _mm512_set1_epi32(128), c255 = _mm512_set1_epi32(255);
  for (int i = 0; i < n_subspaces * 128; i += 16) {
    __m512 x = _mm512_mul_ps(_mm512_loadu_ps(room + i), inverse);
    __m512i entry = _mm512_cvtps_epi32(_mm512_add_ps(x, offset));
    if (wide) {
      // The low byte counts from -127 to 127, so that negating it stays in range: -128 is moved to -127.
      entry = _mm512_mask_add_epi32(entry, _mm512_testn_epi32_mask(entry, c255), entry, _mm512_set1_epi32(1));
      const __m512i low = _mm512_sub_epi32(_mm512_and_si512(entry, c255), c128);
      const __m512i high = _mm512_srai_epi32(_mm512_sub_epi32(_mm512_sub_epi32(entry, c128), low), 8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(luts + n_subspaces * 128 + i), _mm512_cvtepi32_epi8(high));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(luts + i), _mm512_cvtepi32_epi8(entry));
  }
  return step;
}

inline void ask_for(const uint8_t* line) {
  _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1);
}

// Sums of look-ups of `Rows` rows over `Blocks` blocks, asking for as many lines of the blocks `ahead` (for nothing new
// where those are the blocks themselves: a condition in the loop costs more). Bytes are added in 16-bit lanes: `all`
// takes even and odd bytes together, `odd` the odd ones, and the even ones are the difference.
template <int Rows, int Blocks, bool Wide>
inline void look_up_blocks(const uint8_t* luts, const float* steps, int n_subspaces, const uint8_t* const* blocks,
                           const uint8_t* const* ahead, int ahead_lines, float* scores) {
  const int row_bytes = n_subspaces * 128 * (Wide ? 2 : 1);
  __m512i all[Rows][Blocks], odd[Rows][Blocks], high[Rows][Blocks];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 2
    for (int b = 0; b < Blocks; b++) all[r][b] = odd[r][b] = high[r][b] = _mm512_setzero_si512();
  }
#pragma GCC unroll 1
  for (int m = 0; m < n_subspaces; m++) {
    __m512i code[Blocks];
    __mmask64 negative[Blocks];
#pragma GCC unroll 2
    for (int b = 0; b < Blocks; b++) {
      ask_for(ahead[b] + m * kLine);
      code[b] = _mm512_loadu_si512(blocks[b] + m * kLine);
      negative[b] = _mm512_movepi8_mask(code[b]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
      const Table table = load_table(luts + r * row_bytes + m * 128);
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; b++) {
        const __m512i entry = look_up_64(table, code[b], negative[b]);
        all[r][b] = _mm512_add_epi16(all[r][b], entry);
        odd[r][b] = _mm512_add_epi16(odd[r][b], _mm512_srli_epi16(entry, 8));
      }
      if constexpr (Wide) {
        const Table high_table = load_table(luts + r * row_bytes + (n_subspaces + m) * 128);
#pragma GCC unroll 2
        for (int b = 0; b < Blocks; b++) {
          high[r][b] = _mm512_add_epi8(high[r][b], look_up_64(high_table, code[b], negative[b]));
        }
      }
    }
  }
  for (int m = n_subspaces; m < ahead_lines; m++) {
    for (int b = 0; b < Blocks; b++) ask_for(ahead[b] + m * kLine);
  }
  const __m512i offset = _mm512_set1_epi16(short(128 * n_subspaces));
#pragma GCC unroll 2
  for (int b = 0; b < Blocks; b++) {
    const uint8_t* cell_scales = blocks[b] + n_subspaces * kLine;
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
      __m512i half[2] = {_mm512_sub_epi16(all[r][b], _mm512_slli_epi16(odd[r][b], 8)), odd[r][b]};
      if constexpr (Wide) {
        half[0] = _mm512_add_epi16(half[0], _mm512_slli_epi16(high[r][b], 8));
        half[1] = _mm512_add_epi16(half[1], _mm512_and_si512(high[r][b], _mm512_set1_epi16(short(0xff00))));
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const __m512i sums = _mm512_sub_epi16(half[i / 2], offset);
        const __m256i part = i % 2 ? _mm512_extracti64x4_epi64(sums, 1) : _mm512_castsi512_si256(sums);
        const __m512 scale = _mm512_mul_ps(load_half(cell_scales + 32 * i), _mm512_set1_ps(steps[r]));
        _mm512_storeu_ps(scores + r * kSuperblockCells + b * kLine + 16 * i,
                         _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(part))));
      }
    }
  }
}

template <int Rows, bool Wide>
void look_up_rows(const uint8_t* luts, const float* steps, int n_subspaces, const uint8_t* const* blocks, int n_blocks,
                  const Prefetch& prefetch, float* scores) {
  int b = 0;
  for (; n_blocks - b >= 2; b += 2) {
    const bool asks = b + 2 <= prefetch.n_blocks;
    look_up_blocks<Rows, 2, Wide>(luts, steps, n_subspaces, blocks + b, (asks ? prefetch.blocks : blocks) + b,
                                  asks ? prefetch.lines : 0, scores + b * kLine);
  }
  if (b < n_blocks) {
    const bool asks = b + 1 <= prefetch.n_blocks;
    look_up_blocks<Rows, 1, Wide>(luts, steps, n_subspaces, blocks + b, (asks ? prefetch.blocks : blocks) + b,
                                  asks ? prefetch.lines : 0, scores + b * kLine);
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
  for (int b = 0; b < n_blocks; b++) {
    bad[b] = 0;
    for (int i = 0; i < 4; i++) {
      const __m512 scale = load_half(blocks[b] + codes_bytes + 32 * i);
      const __mmask16 not_finite = _mm512_fpclass_ps_mask(scale, 0x01 | 0x08 | 0x10 | 0x80);
      bad[b] |= uint64_t(not_finite) << (16 * i);
      const __m512 finite = _mm512_mask_mov_ps(scale, not_finite, _mm512_setzero_ps());
      // log2(2^e (1 + f)) <= e + f + 0.0861
      const __m512 fraction = _mm512_getmant_ps(finite, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
      const __m512 log = _mm512_add_ps(_mm512_getexp_ps(finite), _mm512_add_ps(fraction, _mm512_set1_ps(0.0862f - 1)));
      _mm512_storeu_ps(scales + b * kLine + 16 * i, finite);
      _mm512_storeu_ps(log_scales + b * kLine + 16 * i, log);
    }
  }
}

// Thresholds between -1/2 and 1/2, evenly spread over any stretch of cells (bit-reversed numbers).
constexpr float dither(int cell) {
  int reversed = 0;
  for (int bit = 0; bit < 6; bit++) reversed |= (cell >> bit & 1) << (5 - bit);
  return (float(reversed) + 0.5f) / 64 - 0.5f;
}

struct DitherTable {
  alignas(64) float at[kLine];
  constexpr DitherTable() : at() {
    for (int i = 0; i < kLine; i++) at[i] = dither(i);
  }
};
constexpr DitherTable kDither;

float code_weights(const float* scores, int n_blocks, float offset, const float* scales, bool wide, int row,
                   uint8_t* weights, uint32_t* used) {
  const __m512i low_byte = _mm512_set1_epi16(255);
  __m512 sum = _mm512_setzero_ps();
  *used = 0;
  for (int b = 0; b < n_blocks; b++) {
    __m512i w[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m512 s = _mm512_loadu_ps(scores + b * kLine + 16 * i);
      const __m512 p = exp2_of(_mm512_fmsub_ps(s, _mm512_set1_ps(kLog2e), _mm512_set1_ps(offset)));
      sum = _mm512_add_ps(sum, p);
      w[i] = _mm512_cvtps_epi32(
          _mm512_fmadd_ps(p, _mm512_loadu_ps(scales + b * kLine + 16 * i), _mm512_load_ps(kDither.at + 16 * i)));
    }
    const __m512i a = _mm512_packs_epi32(w[0], w[1]), c = _mm512_packs_epi32(w[2], w[3]);
    *used |= uint32_t(_mm512_test_epi32_mask(_mm512_or_si512(a, c), _mm512_or_si512(a, c)) != 0) << b;
    uint8_t* to = weights + row * kSuperblockCells + b * kLine;
    if (wide) {
      _mm512_storeu_si512(to, _mm512_packus_epi16(_mm512_and_si512(a, low_byte), _mm512_and_si512(c, low_byte)));
      _mm512_storeu_si512(to + kRowsAtOnce * kSuperblockCells,
                          _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(c, 8)));
    } else {
      _mm512_storeu_si512(to, _mm512_packus_epi16(a, c));
    }
  }
  return _mm512_reduce_add_ps(sum);
}

// _mm512_dpbusd_epi32 in place: GCC 12 copies the sums around it.
inline void add_products(__m512i& sums, __m512i weights, __m512i words) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(words));
}

inline __m512i add_pairs(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

// The components of one group, `Components` of them (2 where weights are wide: 16-bit weights take two sums each).
template <int Rows, int Components, bool Wide>
inline void add_components(const uint8_t* const* blocks, const uint32_t used, const int8_t* words, int code_row,
                           int code_row2, const uint8_t* weights, __m512i (*sums)[4]) {
  Table tables[Components];
  __m512i low[Rows][Components], high[Rows][Components];
#pragma GCC unroll 4
  for (int j = 0; j < Components; j++) {
    tables[j] = load_table(words + j * 128);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) low[r][j] = high[r][j] = _mm512_setzero_si512();
  }
#pragma GCC unroll 1
  for (uint32_t left = used; left; left &= left - 1) {
    const int b = __builtin_ctz(left);
    // Often the same row twice: cheaper than a branch, around which GCC 12 copies the sums.
    const __m512i code[2] = {_mm512_loadu_si512(blocks[b] + code_row * kLine),
                             _mm512_loadu_si512(blocks[b] + code_row2 * kLine)};
    __m512i w[Rows], w_high[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
      w[r] = _mm512_loadu_si512(weights + r * kSuperblockCells + b * kLine);
      if (Wide) w_high[r] = _mm512_loadu_si512(weights + (kRowsAtOnce + r) * kSuperblockCells + b * kLine);
    }
#pragma GCC unroll 4
    for (int j = 0; j < Components; j++) {
      const __m512i word = look_up_64(tables[j], code[j / 2], _mm512_movepi8_mask(code[j / 2]));
#pragma GCC unroll 4
      for (int r = 0; r < Rows; r++) {
        add_products(low[r][j], w[r], word);
        if (Wide) add_products(high[r][j], w_high[r], word);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 4
    for (int j = 0; j < Components; j++) {
      sums[r][j] = Wide ? _mm512_add_epi32(low[r][j], _mm512_slli_epi32(high[r][j], 8)) : low[r][j];
    }
  }
}

template <int Rows, bool Wide>
void add_rows(const uint8_t* const* blocks, uint32_t used, const int8_t* words, const ValueGroup* groups, int n_groups,
              const uint8_t* weights, const float* shrink, const float* factor, const Prefetch& prefetch, float* sums) {
  for (int g = 0; g < n_groups; g++) {
    const ValueGroup group = groups[g];
    const int8_t* table = words + group.component * 128;
    if (g < prefetch.lines) {
      for (int b = 0; b < prefetch.n_blocks; b++) ask_for(prefetch.blocks[b] + g * kLine);
    }
    __m512i part[Rows][4];
    if (!Wide && group.components == 4) {
      add_components<Rows, 4, Wide>(blocks, used, table, group.code_row, group.code_row2, weights, part);
    } else {
      add_components<Rows, 2, Wide>(blocks, used, table, group.code_row, group.code_row, weights, part);
      __m512i second[Rows][4];
      if (group.components == 4) {
        add_components<Rows, 2, Wide>(blocks, used, table + 256, group.code_row2, group.code_row2, weights, second);
      }
      for (int r = 0; r < Rows; r++) {
        for (int j = 0; j < 2; j++) part[r][2 + j] = group.components == 4 ? second[r][j] : _mm512_setzero_si512();
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
      const __m512i ab = add_pairs(part[r][0], part[r][1]), cd = add_pairs(part[r][2], part[r][3]);
      const __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
      float* to = sums + (r * n_groups + g) * 16;
      const __m512 old = _mm512_mul_ps(_mm512_loadu_ps(to), _mm512_set1_ps(shrink[r]));
      _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(abcd), _mm512_set1_ps(factor[r]), old));
    }
  }
  for (int line = n_groups; line < prefetch.lines; line++) {
    for (int b = 0; b < prefetch.n_blocks; b++) ask_for(prefetch.blocks[b] + line * kLine);
  }
}

void add_values(const uint8_t* const* blocks, int, uint32_t used, const int8_t* words, const ValueGroup* groups,
                int n_groups, const uint8_t* weights, bool wide, int n_rows, const float* shrink, const float* factor,
                const Prefetch& prefetch, float* sums) {
  using Add = void (*)(const uint8_t* const*, uint32_t, const int8_t*, const ValueGroup*, int, const uint8_t*,
                       const float*, const float*, const Prefetch&, float*);
  static constexpr Add kAdd[2][kRowsAtOnce] = {
      {add_rows<1, false>, add_rows<2, false>, add_rows<3, false>, add_rows<4, false>},
      {add_rows<1, true>, add_rows<2, true>, add_rows<3, true>, add_rows<4, true>}};
  kAdd[wide][n_rows - 1](blocks, used, words, groups, n_groups, weights, shrink, factor, prefetch, sums);
}

constexpr IsaOps kOps{"avx512",      {7.99f, 14.98f}, nearest,     times_matrix, hadamard,     decode_keys,
                      decode_values, load_keys,       load_values, multiply,     mask_bits,    finish_scores,
                      exponentiate,  build_luts,      look_up,     value_scales, code_weights, add_values};

}  // namespace

extern const IsaOps* const kAvx512Ops = &kOps;

}  // namespace thimble
