// AVX2: attention from codes.
#include "attention/avx2.h"

namespace thimble {
namespace {

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
  __m128i before[2] = {};  // sixteenths, of the low and of the high bytes
  const auto store = [&](uint8_t* to, __m128i sixteenth, int i, __m128i& previous) {
    const __m128i difference = i % 128 == 0 ? sixteenth : _mm_xor_si128(sixteenth, previous);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), difference);
    previous = sixteenth;
  };
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
    store(luts, low_bytes(entry[0], entry[1]), i, before[0]);
    if (wide) store(luts + n_subspaces * 128, low_bytes(high[0], high[1]), i, before[1]);
  }
  return step;
}

inline void ask_for(const uint8_t* line) {
  _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1);
}

// 32 codes in several tables of differences, `stride` apart.
template <int N>
inline void look_up_all(const uint8_t* tables, int stride, const Codes& codes, __m256i (&found)[N]) {
  __m256i entry = codes.entry;
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    if (i > 0) entry = _mm256_sub_epi8(entry, _mm256_set1_epi8(16));
    settle(entry);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      const __m256i part = _mm256_shuffle_epi8(load_sixteenth(tables + n * stride, i), entry);
      found[n] = i == 0 ? part : _mm256_xor_si256(found[n], part);
      settle(found[n]);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) found[n] = _mm256_sign_epi8(found[n], codes.sign);
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
    const Codes codes = codes_of(load_bytes(block + m * kLine + 32 * h));
    __m256i entry[Rows], high_entry[Rows];
    look_up_all(luts + m * 128, row_bytes, codes, entry);
    if (Wide) look_up_all(luts + (n_subspaces + m) * 128, row_bytes, codes, high_entry);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
      all[r] = _mm256_add_epi16(all[r], entry[r]);
      odd[r] = _mm256_add_epi16(odd[r], _mm256_srli_epi16(entry[r], 8));
      if (Wide) high[r] = _mm256_add_epi8(high[r], high_entry[r]);
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
    for (int j = 0; j < group.components; j++) {
      const Table table = load_table(words + (group.component + j) * 128);
      const int code_row = j < 2 ? group.code_row : group.code_row2;
      __m256i component[Rows];
      for (__m256i& sum : component) sum = _mm256_setzero_si256();
#pragma GCC unroll 1
      for (uint32_t left = used; left; left &= left - 1) {
        const int b = __builtin_ctz(left);
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
          const __m256i word = look_up_32(table, codes_of(load_bytes(blocks[b] + code_row * kLine + 32 * h)));
          const __m256i first = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(word));
          const __m256i second = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(word, 1));
          const uint8_t* w = weights + (b * kLine + 32 * h) * 2;
#pragma GCC unroll 4
          for (int r = 0; r < Rows; r++) {
            const __m256i products =
                _mm256_add_epi32(_mm256_madd_epi16(first, load_bytes(w + r * kSuperblockCells * 2)),
                                 _mm256_madd_epi16(second, load_bytes(w + r * kSuperblockCells * 2 + 32)));
            component[r] = _mm256_add_epi32(component[r], products);
          }
        }
      }
      for (int r = 0; r < Rows; r++) part[r][j] = component[r];
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

}  // namespace

const CodeOps kAvx2CodeOps{{14.98f, 14.98f}, build_luts, look_up, value_scales, code_weights, add_values};

}  // namespace thimble
