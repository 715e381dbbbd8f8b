// AVX2: encoding, tiles, softmax.
#include "kernels/avx2/avx2.h"

namespace thimble {
namespace {

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
    __m256 v = load_lanes(x + i, n - i);
    if (block > 1) v = butterfly<1>(v);
    if (block > 2) v = butterfly<2>(v);
    if (block > 4) v = butterfly<4>(v);
    if (block <= 8) v = _mm256_mul_ps(v, _mm256_set1_ps(norm));
    store_lanes(x + i, v, n - i);
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

// -- tiles --

void decode_keys(const uint8_t* block, const uint8_t* cell_scales, const int8_t* words, const uint8_t* code_row,
                 const float* scale, int dim, float* tile) {
  __m256 cells[8];
  for (int i = 0; i < 8; i++) cells[i] = load_half(cell_scales + 16 * i);
  for (int d = 0; d < dim; d++) {
    const Table table = load_table(words + d * 128);
    const __m256 component = _mm256_set1_ps(scale[d]);
    for (int h = 0; h < 2; h++) {
      const __m256i bytes = look_up_32(table, codes_of(load_bytes(block + code_row[d] * kLine + 32 * h)));
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
      const Table table = load_table(words + (d + i) * 128);
      for (int h = 0; h < 2; h++) {
        const Codes codes = codes_of(load_bytes(block + code_row[d + i] * kLine + 32 * h));
        _mm256_store_si256(reinterpret_cast<__m256i*>(bytes[i] + 32 * h), look_up_32(table, codes));
      }
    }
    for (int quarter = 0; quarter < 4; quarter++) {
      __m128i r[16];
      for (int i = 0; i < 16; i++) r[i] = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes[i] + 16 * quarter));
      transpose_bytes(r);
      for (int i = 0; i < 16; i++) {
        const int cell = i / 4 * 16 + quarter * 4 + i % 4;  // the one whose value_position is 16 * quarter + i
        for (int j = 0; j < n; j += 8) {
          const __m256 component = load_lanes(scale + d + j, n - j);
          const __m128i word = j ? _mm_srli_si128(r[i], 8) : r[i];
          const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(word)), component);
          store_lanes(tile + cell * dim + d + j, _mm256_mul_ps(value, _mm256_set1_ps(cells[cell])), n - j);
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
      store_lanes(tile + cell * dim + d, load_halves(rows[cell] + 2 * d, dim - d), dim - d);
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

}  // namespace

const TileOps kAvx2TileOps{nearest,     times_matrix, hadamard,  decode_keys,   decode_values, load_keys,
                           load_values, multiply,     mask_bits, finish_scores, exponentiate};

}  // namespace thimble
