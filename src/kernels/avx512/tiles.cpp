// AVX-512: encoding, tiles, softmax.
#include "kernels/avx512/avx512.h"

namespace thimble {
namespace {

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
      const __mmask16 lanes = Columns == 1 ? last : __mmask16(0xffff);
      sums[r][j] = add ? _mm512_maskz_loadu_ps(lanes, c + r * c_stride + 16 * j) : _mm512_setzero_ps();
    }
  }
  for (int i = 0; i < k; i++) {
    __m512 row[Columns];
#pragma GCC unroll 4
    for (int j = 0; j < Columns; j++) {
      row[j] = Columns == 1 ? _mm512_maskz_loadu_ps(last, b + i * b_stride + 16 * j)
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
      _mm512_mask_storeu_ps(c + r * c_stride + 16 * j, Columns == 1 ? last : __mmask16(0xffff), sums[r][j]);
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

// Six rows fill the registers; the last one to six go in one pass, too.
template <bool Fused>
void multiply_all(const float* a, int a_stride, const float* b, int b_stride, int rows, int k, int n, float* c,
                  int c_stride, bool add) {
  using Multiply = void (*)(const float*, int, const float*, int, int, int, float*, int, bool);
  static constexpr Multiply kMultiply[6] = {multiply_rows<1, Fused>, multiply_rows<2, Fused>, multiply_rows<3, Fused>,
                                            multiply_rows<4, Fused>, multiply_rows<5, Fused>, multiply_rows<6, Fused>};
  for (int r = 0; r < rows; r += 6) {
    const int at_once = rows - r < 6 ? rows - r : 6;
    kMultiply[at_once - 1](a + r * a_stride, a_stride, b, b_stride, k, n, c + r * c_stride, c_stride, add);
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
      if (cell >= n) {  // a short context's only tile is mostly empty
        for (int i = 0; i < 16 && d + i < dim; i++)
          _mm512_storeu_ps(tile + (d + i) * kLine + cell, _mm512_setzero_ps());
        continue;
      }
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

}  // namespace

const TileOps kAvx512TileOps{nearest,     times_matrix, hadamard,  decode_keys,   decode_values, load_keys,
                             load_values, multiply,     mask_bits, finish_scores, exponentiate};

}  // namespace thimble
