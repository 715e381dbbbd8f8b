// AVX-512: encoding, tiles, softmax.
#include "kernels/avx512/avx512.h"
#include "kernels/vector/tile_loops.h"
#include "kernels/vector/word_loops.h"

namespace thimble {
namespace {

// Widens 64 bytes in key order to four vectors of 16 cells, in the cells' own order.
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
        const int cell = i / 4 * 16 + lane * 4 + i % 4;  // its value_position is 16 * lane + i
        const __m128i row = _mm_load_si128(reinterpret_cast<const __m128i*>(quarters + 16 * lane));
        const __m512 word = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(row)), scales);
        _mm512_mask_storeu_ps(tile + cell * dim + d, lanes, _mm512_mul_ps(word, _mm512_set1_ps(cells[cell])));
      }
    }
  }
}

void key_words(const uint8_t* block, const int8_t* words, const uint8_t* code_row, int dim, int16_t* tile) {
  for (int d = 0; d < dim; d += 2) {
    const __m512i a = decoded(block, words, code_row, d), b = decoded(block, words, code_row, d + 1);
    // Even bytes are cells 0 to 31, odd bytes cells 32 to 63. A cell's numbers of `a` and `b` become one lane.
    const __m512i low[2] = {_mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8), _mm512_srai_epi16(a, 8)};
    const __m512i high[2] = {_mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8), _mm512_srai_epi16(b, 8)};
    for (int i = 0; i < 4; i++) {
      const auto half = [&](__m512i x) {
        return _mm512_cvtepu16_epi32(i % 2 ? _mm512_extracti64x4_epi64(x, 1) : _mm512_castsi512_si256(x));
      };
      _mm512_storeu_si512(tile + d * kLine + 32 * i,
                          _mm512_or_si512(half(low[i / 2]), _mm512_slli_epi32(half(high[i / 2]), 16)));
    }
  }
}

void value_words(const uint8_t* block, const int8_t* words, const uint8_t* code_row, int dim, int16_t* tile) {
  const int columns = padded_columns(dim);
  for (int d = 0; d < dim; d += 16) {
    const int n = dim - d < 16 ? dim - d : 16;
    __m512i bytes[16];
    for (int i = 0; i < 16; i++) bytes[i] = i < n ? decoded(block, words, code_row, d + i) : _mm512_setzero_si512();
    transpose_bytes(bytes);
    for (int i = 0; i < 16; i += 2) {  // lane l of bytes[i], bytes[i + 1]: cells i / 4 * 16 + 4 l + i % 4 and the next
      alignas(64) int8_t low[kLine], high[kLine];
      _mm512_store_si512(low, zip_low(bytes[i], bytes[i + 1]));
      _mm512_store_si512(high, zip_high(bytes[i], bytes[i + 1]));
      for (int lane = 0; lane < 4; lane++) {
        const int cell = i / 4 * 16 + lane * 4 + i % 4;
        int16_t* to = tile + cell * columns + 2 * d;
        const auto widened = [&](const int8_t* from) {
          return _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(from + 16 * lane)));
        };
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), widened(low));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + 1, widened(high));
      }
    }
  }
}

MaskBits mask_bits(const uint16_t* mask) {
  const __m512i low = _mm512_loadu_si512(mask), high = _mm512_loadu_si512(mask + 32);
  const __m512i hidden = _mm512_set1_epi16(short(0xfc00)), magnitude = _mm512_set1_epi16(0x7fff);
  const uint64_t visible = _mm512_cmpneq_epi16_mask(low, hidden) | uint64_t(_mm512_cmpneq_epi16_mask(high, hidden))
                                                                       << 32;
  const uint64_t not_zero = _mm512_test_epi16_mask(low, magnitude) | uint64_t(_mm512_test_epi16_mask(high, magnitude))
                                                                         << 32;
  return {visible, (visible & not_zero) != 0};
}

}  // namespace

const TileOps kAvx512TileOps{nearest,     times_matrix, hadamard,  decode_keys,   decode_values,  load_keys,
                             load_values, multiply,     mask_bits, finish_scores, best_of_rows,   block_maxima,
                             at_least,    exponentiate, key_words, value_words,   multiply_words, word_weights};

}  // namespace thimble
