// AVX2: encoding, tiles, softmax.
#include "kernels/avx2/avx2.h"
#include "kernels/vector/tile_loops.h"
#include "kernels/vector/word_loops.h"

namespace thimble {
namespace {

void decode_keys(const uint8_t* block, const uint8_t* cell_scales, const int8_t* words, const uint8_t* code_row,
                 const float* scale, int dim, float* tile) {
  __m256 cells[8];
  for (int i = 0; i < 8; i++) cells[i] = load_half(cell_scales + 16 * i);
  for (int d = 0; d < dim; d++) {
    const Table table = load_table(words + d * 128);
    const __m256 component = _mm256_set1_ps(scale[d]);
    for (int h = 0; h < 2; h++) {
      const __m256i bytes = look_up_32(table, codes_of(load_bytes(block + code_row[d] * kLine + 32 * h)));
      // Even bytes are cells 16 h to 16 h + 15, odd bytes cells 32 + 16 h to 32 + 16 h + 15.
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
        const int cell = i / 4 * 16 + quarter * 4 + i % 4;  // its value_position is 16 * quarter + i
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

void key_words(const uint8_t* block, const int8_t* words, const uint8_t* code_row, int dim, int16_t* tile) {
  for (int d = 0; d < dim; d += 2) {
    const Table tables[2] = {load_table(words + d * 128), load_table(words + (d + 1) * 128)};
    for (int h = 0; h < 2; h++) {
      // Even bytes are cells 16 h to 16 h + 15, odd bytes cells 32 + 16 h to 32 + 16 h + 15. A cell's two numbers
      // become one lane.
      __m256i part[2][2];  // [component][odd]
      for (int j = 0; j < 2; j++) {
        const __m256i bytes = look_up_32(tables[j], codes_of(load_bytes(block + code_row[d + j] * kLine + 32 * h)));
        part[j][0] = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
        part[j][1] = _mm256_srai_epi16(bytes, 8);
      }
      for (int odd = 0; odd < 2; odd++) {
        const __m256i low = _mm256_unpacklo_epi16(part[0][odd], part[1][odd]);   // cells 0 to 3 and 8 to 11
        const __m256i high = _mm256_unpackhi_epi16(part[0][odd], part[1][odd]);  // cells 4 to 7 and 12 to 15
        __m256i* to = reinterpret_cast<__m256i*>(tile + d * kLine + 2 * (32 * odd + 16 * h));
        _mm256_storeu_si256(to, _mm256_permute2x128_si256(low, high, 0x20));
        _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(low, high, 0x31));
      }
    }
  }
}

void value_words(const uint8_t* block, const int8_t* words, const uint8_t* code_row, int dim, int16_t* tile) {
  const int columns = padded_columns(dim);
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
      for (int i = 0; i < 16; i += 2) {  // cells i / 4 * 16 + 4 quarter + i % 4 and the next
        __m256i* to = reinterpret_cast<__m256i*>(tile + (i / 4 * 16 + quarter * 4 + i % 4) * columns + 2 * d);
        _mm256_storeu_si256(to, _mm256_cvtepi8_epi16(zip_low(r[i], r[i + 1])));
        _mm256_storeu_si256(to + 1, _mm256_cvtepi8_epi16(zip_high(r[i], r[i + 1])));
      }
    }
  }
}

MaskBits mask_bits(const uint16_t* mask) {
  const __m256i any = _mm256_or_si256(_mm256_or_si256(load_bytes(mask), load_bytes(mask + 16)),
                                      _mm256_or_si256(load_bytes(mask + 32), load_bytes(mask + 48)));
  if (_mm256_testz_si256(any, any)) return {~uint64_t{0}, false};  // most often, all cells are visible
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

}  // namespace

const TileOps kAvx2TileOps{nearest,     times_matrix, hadamard,  decode_keys,   decode_values,  load_keys,
                           load_values, multiply,     mask_bits, finish_scores, best_of_rows,   block_maxima,
                           at_least,    exponentiate, key_words, value_words,   multiply_words, word_weights};

}  // namespace thimble
