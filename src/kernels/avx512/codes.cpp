// AVX-512: attention from codes.
#include "kernels/avx512/avx512.h"
#include "kernels/vector/code_loops.h"

namespace thimble {
namespace {

// 128 bytes for each subspace, which hold 128 + q.codeword / step. Where `wide`, these are the low bytes, and 128 more
// for each subspace hold the high bytes.
size_t lut_bytes(int, int n_subspaces, bool wide) {
  return size_t(n_subspaces) * 128 * (wide ? 2 : 1);
}

float build_luts(const float* q, const int8_t* words, const uint8_t* width, int n_subspaces, bool wide, float* room,
                 uint8_t* luts) {
  float* maxima = room + n_subspaces * 128;
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
    __m512 greatest = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      _mm512_storeu_ps(room + m * 128 + 16 * i, sums[i]);
      greatest = _mm512_max_ps(greatest, _mm512_abs_ps(sums[i]));
    }
    maxima[m] = _mm512_reduce_max_ps(greatest);
    largest = maxima[m] > largest ? maxima[m] : largest;
    total += maxima[m];
  }
  // Rounding, and the change to low bytes below, add at most 2 to an entry, so sums fit 16 bits.
  float step = wide ? total / (32767.0f - 2.0f * n_subspaces) : largest / 127.0f;
  step = step > 1e-30f ? step : 1e-30f;
  const __m512 inverse = _mm512_set1_ps(1.0f / step), offset = _mm512_set1_ps(128.0f);
  const __m512i c128 = _mm512_set1_epi32(128), c255 = _mm512_set1_epi32(255);
  for (int i = 0; i < n_subspaces * 128; i += 16) {
    __m512 x = _mm512_mul_ps(_mm512_loadu_ps(room + i), inverse);
    __m512i entry = _mm512_cvtps_epi32(_mm512_add_ps(x, offset));
    if (wide) {
      // The low byte must be -127 to 127, so that it can be negated: -128 becomes -127.
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

// The sums of 64 cells' even and odd bytes, 16 cells to a vector, in order of cells.
inline void order_cells(const __m512i (&sums)[2], bool of_values, __m512i (&cells)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    if (of_values) {
      const __m512i bytes = i / 2 ? _mm512_unpackhi_epi16(sums[0], sums[1]) : _mm512_unpacklo_epi16(sums[0], sums[1]);
      const __m512i twice = i % 2 ? _mm512_unpackhi_epi16(bytes, bytes) : _mm512_unpacklo_epi16(bytes, bytes);
      cells[i] = _mm512_srai_epi32(twice, 16);
    } else {
      const __m256i part = i % 2 ? _mm512_extracti64x4_epi64(sums[i / 2], 1) : _mm512_castsi512_si256(sums[i / 2]);
      cells[i] = _mm512_cvtepi16_epi32(part);
    }
  }
}

// Writes the scores of `Rows` rows for `Blocks` blocks, and prefetches ahead_lines lines of the blocks `ahead`. Where
// there is nothing to prefetch, `ahead` is the blocks themselves: a condition in the loop costs more. Bytes are added
// in 16-bit lanes: `all` has the sum of even bytes + 256 * odd bytes, `odd` that of the odd bytes, and the even bytes'
// sum is the difference.
template <int Rows, int Blocks, bool Wide>
inline void look_up_blocks(const uint8_t* luts, const float* steps, int n_subspaces, bool of_values,
                           const uint8_t* const* blocks, const uint8_t* const* ahead, int ahead_lines, float* scores,
                           size_t stride) {
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
      const __m512i sums[2] = {_mm512_sub_epi16(half[0], offset), _mm512_sub_epi16(half[1], offset)};
      __m512i cells[4];
      order_cells(sums, of_values, cells);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const __m512 scale = _mm512_mul_ps(load_half(cell_scales + 32 * i), _mm512_set1_ps(steps[r]));
        _mm512_storeu_ps(scores + r * stride + b * kLine + 16 * i, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(cells[i])));
      }
    }
  }
}

template <int Rows, bool Wide>
void look_up_rows(const uint8_t* luts, const float* steps, int n_subspaces, bool of_values,
                  const uint8_t* const* blocks, int n_blocks, const Prefetch& prefetch, float* scores, size_t stride) {
  int b = 0;
  for (; n_blocks - b >= 2; b += 2) {
    const bool asks = b + 2 <= prefetch.n_blocks;
    look_up_blocks<Rows, 2, Wide>(luts, steps, n_subspaces, of_values, blocks + b,
                                  (asks ? prefetch.blocks : blocks) + b, asks ? prefetch.lines : 0, scores + b * kLine,
                                  stride);
  }
  if (b < n_blocks) {
    const bool asks = b + 1 <= prefetch.n_blocks;
    look_up_blocks<Rows, 1, Wide>(luts, steps, n_subspaces, of_values, blocks + b,
                                  (asks ? prefetch.blocks : blocks) + b, asks ? prefetch.lines : 0, scores + b * kLine,
                                  stride);
  }
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

// _mm512_dpbusd_epi32 in place, since GCC 12 copies the sums before and after the intrinsic.
inline void add_products(__m512i& sums, __m512i weights, __m512i words) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(words));
}

inline __m512i add_pairs(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

// Sums weight * codeword for `Components` components of a group over the used blocks. Where weights are wide,
// Components is 2, since a 16-bit weight takes two sums.
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
    // The two rows are often the same one. To load it twice is cheaper than a branch, around which GCC 12 copies the
    // sums.
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

}  // namespace

const CodeOps kAvx512CodeOps{{7.99f, 14.98f}, lut_bytes, build_luts, look_up, value_scales, code_weights, add_values};

}  // namespace thimble
