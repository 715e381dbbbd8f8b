// AVX2: attention from codes.
#include "kernels/avx2/avx2.h"
#include "kernels/vector/code_loops.h"

namespace thimble {
namespace {

// The low bytes of 16 numbers that fit 16 bits.
inline __m128i low_bytes(__m256i first, __m256i second) {
  const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
  const __m256i bytes = _mm256_and_si256(both, _mm256_set1_epi16(255));
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi16(bytes, bytes), 0xd8));
}

// Stores sixteenths of tables, one after the other, as differences (avx2.h).
class TableWriter {
public:
  explicit TableWriter(uint8_t* to) : to_(to) {}
  void write(__m128i sixteenth) {
    const __m128i difference = n_ % 8 == 0 ? sixteenth : _mm_xor_si128(sixteenth, before_);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to_) + n_++, difference);
    before_ = sixteenth;
  }

private:
  uint8_t* to_;
  int n_ = 0;
  __m128i before_ = _mm_setzero_si128();
};

// Two components of a query row where tables are wide. Such subspaces mostly have just two components. To look up their
// codewords once for all rows and to multiply takes less time than look-ups in two score tables for each row.
struct alignas(kLine) Pair {
  uint8_t words[2][128];  // codewords of the two components, the same in every row
  uint32_t query[2];      // a 16-bit number, in both halves
};

// Products are whole steps and are summed in 16 bits, so a step is the coarser the more products a sum has. Hence those
// of each section, this many subspaces, are summed by themselves, and a row's sum is in coarser steps: only the
// rounding of the sections' sums is as coarse.
constexpr int kSection = 64;

// log2 of the section's steps that a step of a row's sum is: with so many sections, no sum overflows.
inline int section_bits(int n_subspaces) {
  int bits = 0;
  while (kSection << bits < n_subspaces) bits++;
  return bits;
}

// Wide tables of a row: a byte for each subspace, how many pairs it has; then, from the next line of 64 bytes, the
// pairs.
inline size_t pairs_at(int n_subspaces) {
  return size_t(n_subspaces + kLine - 1) / kLine * kLine;
}

size_t lut_bytes(int dim, int n_subspaces, bool wide) {
  return wide ? pairs_at(n_subspaces) + size_t(dim / 2) * sizeof(Pair) : size_t(n_subspaces) * 128;
}

// The step is chosen so that no section's sum of products overflows 16 bits. Returns what a row's sum counts: steps of
// products with 128, times those that its own step is.
float build_pairs(const float* q, const int8_t* words, const uint8_t* width, int n_subspaces, uint8_t* luts) {
  float step = 1e-30f;
  const float* end = q;
  for (int m = 0; m < n_subspaces;) {
    float total = 0;
    const float* section = end;
    for (const int last = m + kSection; m < last && m < n_subspaces; m++) {
      luts[m] = width[m] / 2;
      for (int j = 0; j < width[m]; j++, end++) total += *end < 0 ? -*end : *end;
    }
    // Rounding adds at most 1/2 to a product.
    const float least = total / (32767.0f - float(end - section));
    step = least > step ? least : step;
  }
  for (Pair* pair = reinterpret_cast<Pair*>(luts + pairs_at(n_subspaces)); q < end; pair++) {
    for (int j = 0; j < 2; j++, q++, words += 128) {
      TableWriter writer(pair->words[j]);
      for (int i = 0; i < 128; i += 16) writer.write(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words + i)));
      pair->query[j] = uint32_t(_mm_cvtss_si32(_mm_set_ss(*q / step)) & 0xffff) * 0x10001;
    }
  }
  return float(128 << section_bits(n_subspaces)) * step;
}

float build_luts(const float* q, const int8_t* words, const uint8_t* width, int n_subspaces, bool wide, float* room,
                 uint8_t* luts) {
  if (wide) return build_pairs(q, words, width, n_subspaces, luts);
  float largest = 0;
  for (int m = 0; m < n_subspaces; q += width[m], words += width[m] * 128, m++) {
    __m256 greatest = _mm256_setzero_ps();
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
        greatest = _mm256_max_ps(greatest, magnitude(sums[i]));
      }
    }
    const float greatest_one = max_of(greatest);
    largest = greatest_one > largest ? greatest_one : largest;
  }
  const float step = largest > 127e-30f ? largest / 127.0f : 1e-30f;
  const __m256 inverse = _mm256_set1_ps(1.0f / step), offset = _mm256_set1_ps(128.0f);
  TableWriter writer(luts);
  for (int i = 0; i < n_subspaces * 128; i += 16) {
    const auto entries = [&](const float* from) {
      return _mm256_cvtps_epi32(_mm256_fmadd_ps(_mm256_loadu_ps(from), inverse, offset));
    };
    writer.write(low_bytes(entries(room + i), entries(room + i + 8)));
  }
  return step;
}

inline void ask_for(const uint8_t* line) {
  _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1);
}

// Looks up 32 codes in N tables of differences, `stride` bytes apart.
template <int N>
inline void look_up_all(const uint8_t* tables, int stride, const Codes& codes, __m256i (&found)[N]) {
  __m256i entry = codes.entry;
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    if (i > 0) entry = _mm256_sub_epi8(entry, _mm256_set1_epi8(16));
    settle(entry);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      const __m256i part = _mm256_shuffle_epi8(load_sixteenth(tables + n * stride, i), entry);
      found[n] = i == 0 ? part : _mm256_xor_si256(found[n], part);
      settle(found[n]);
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; n++) found[n] = _mm256_sign_epi8(found[n], codes.sign);
}

// Adds up the table entries of 32 cells, half a block, over the subspaces, as 16-bit numbers: sums[row][0] for even
// bytes, [1] for odd ones. Prefetches `lines` lines from `ahead` on.
template <int Rows>
inline void sum_tables(const uint8_t* luts, int n_subspaces, const uint8_t* codes, const uint8_t* ahead, int lines,
                       __m256i (&sums)[Rows][2]) {
  // Bytes are added in 16-bit lanes: `all` takes even and odd bytes together, and the even ones are the difference.
  __m256i all[Rows], odd[Rows];
  for (int r = 0; r < Rows; r++) all[r] = odd[r] = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (int m = 0; m < n_subspaces; m++) {
    if (m < lines) ask_for(ahead + m * kLine);
    __m256i entry[Rows];
    look_up_all(luts + m * 128, n_subspaces * 128, codes_of(load_bytes(codes + m * kLine)), entry);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
      all[r] = _mm256_add_epi16(all[r], entry[r]);
      odd[r] = _mm256_add_epi16(odd[r], _mm256_srli_epi16(entry[r], 8));
    }
  }
  const __m256i offset = _mm256_set1_epi16(short(128 * n_subspaces));
  for (int r = 0; r < Rows; r++) {
    sums[r][0] = _mm256_sub_epi16(_mm256_sub_epi16(all[r], _mm256_slli_epi16(odd[r], 8)), offset);
    sums[r][1] = _mm256_sub_epi16(odd[r], offset);
  }
}

// Adds up the products of the subspaces [first, last), whose pairs start at `pair`, which then points behind them.
template <int Rows>
[[gnu::always_inline]] inline void sum_section(const uint8_t* luts, const uint8_t*& pair, int row_bytes, int first,
                                               int last, const uint8_t* codes, const uint8_t* ahead, int lines,
                                               __m256i (&sums)[Rows][2]) {
  __m256i even[Rows], odd[Rows];
  for (int r = 0; r < Rows; r++) even[r] = odd[r] = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (int m = first; m < last; m++) {
    if (m < lines) ask_for(ahead + m * kLine);
    const Codes x = codes_of(load_bytes(codes + m * kLine));
    for (const uint8_t* end = pair + luts[m] * sizeof(Pair); pair < end; pair += sizeof(Pair)) {
      __m256i word[2];
      look_up_all(pair, 128, x, word);
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        const __m256i low = _mm256_slli_epi16(word[j], 8);
        const __m256i high = _mm256_and_si256(word[j], _mm256_set1_epi16(short(0xff00)));
#pragma GCC unroll 4
        for (int r = 0; r < Rows; r++) {
          const __m256i q = _mm256_set1_epi32(reinterpret_cast<const Pair*>(pair + r * row_bytes)->query[j]);
          even[r] = _mm256_add_epi16(even[r], _mm256_mulhrs_epi16(low, q));
          settle(even[r]);
          odd[r] = _mm256_add_epi16(odd[r], _mm256_mulhrs_epi16(high, q));
          settle(odd[r]);
        }
      }
    }
  }
  for (int r = 0; r < Rows; r++) {
    sums[r][0] = even[r];
    sums[r][1] = odd[r];
  }
}

// As sum_tables, with products.
template <int Rows>
inline void sum_products(const uint8_t* luts, int row_bytes, int n_subspaces, const uint8_t* codes,
                         const uint8_t* ahead, int lines, __m256i (&sums)[Rows][2]) {
  const uint8_t* pair = luts + pairs_at(n_subspaces);
  if (n_subspaces <= kSection) {
    return sum_section(luts, pair, row_bytes, 0, n_subspaces, codes, ahead, lines, sums);
  }
  const __m256i coarser = _mm256_set1_epi16(short(0x8000 >> section_bits(n_subspaces)));
  for (int r = 0; r < Rows; r++) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
  for (int first = 0; first < n_subspaces; first += kSection) {
    const int last = first + kSection < n_subspaces ? first + kSection : n_subspaces;
    __m256i section[Rows][2];
    sum_section(luts, pair, row_bytes, first, last, codes, ahead, lines, section);
    for (int r = 0; r < Rows; r++) {
      for (int i = 0; i < 2; i++) {
        sums[r][i] = _mm256_add_epi16(sums[r][i], _mm256_mulhrs_epi16(section[r][i], coarser));
      }
    }
  }
}

// The sums of the cells of half a block, even and odd bytes: those of its eight cells number `i`, in order of cells.
inline __m256i order_cells(const __m256i (&sums)[2], bool of_values, int i) {
  if (of_values) {
    const __m256i bytes = i / 2 ? _mm256_unpackhi_epi16(sums[0], sums[1]) : _mm256_unpacklo_epi16(sums[0], sums[1]);
    const __m256i twice = i % 2 ? _mm256_unpackhi_epi16(bytes, bytes) : _mm256_unpacklo_epi16(bytes, bytes);
    return _mm256_srai_epi32(twice, 16);
  }
  const __m256i half = sums[i / 2];
  return _mm256_cvtepi16_epi32(i % 2 ? _mm256_extracti128_si256(half, 1) : _mm256_castsi256_si128(half));
}

template <int Rows, bool Wide>
void look_up_rows(const uint8_t* luts, const float* steps, int n_subspaces, bool of_values,
                  const uint8_t* const* blocks, int n_blocks, const Prefetch& prefetch, float* scores, size_t stride) {
  int n_pairs = 0;
  for (int m = 0; m < n_subspaces && Wide; m++) n_pairs += luts[m];
  const int row_bytes = int(lut_bytes(2 * n_pairs, n_subspaces, Wide));
  for (int b = 0; b < n_blocks; b++) {
    const bool asks = b < prefetch.n_blocks;
    const uint8_t* ahead = asks ? prefetch.blocks[b] : nullptr;
    for (int m = n_subspaces; asks && m < prefetch.lines; m++) ask_for(ahead + m * kLine);
    const uint8_t* cell_scales = blocks[b] + n_subspaces * kLine;
    for (int h = 0; h < 2; h++) {
      __m256i sums[Rows][2];
      const int lines = asks && h == 0 ? prefetch.lines : 0;
      if (Wide) {
        sum_products(luts, row_bytes, n_subspaces, blocks[b] + 32 * h, ahead, lines, sums);
      } else {
        sum_tables(luts, n_subspaces, blocks[b] + 32 * h, ahead, lines, sums);
      }
      for (int r = 0; r < Rows; r++) {
        for (int i = 0; i < 4; i++) {
          const int cell = of_values ? 16 * i + 8 * h : 32 * (i / 2) + 16 * h + 8 * (i % 2);
          const __m256 scale = _mm256_mul_ps(load_half(cell_scales + 2 * cell), _mm256_set1_ps(steps[r]));
          _mm256_storeu_ps(scores + r * stride + b * kLine + cell,
                           _mm256_mul_ps(scale, _mm256_cvtepi32_ps(order_cells(sums[r], of_values, i))));
        }
      }
    }
  }
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

// Numbers 0 and 2, or 1 and 3, of each lane.
template <int First>
inline __m256i every_other(__m256i a, __m256i b) {
  return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), First ? 0xdd : 0x88));
}

// Weights are 16-bit numbers whatever `wide` says: `vpmaddubsw` would allow weights of 7 bits, which are too coarse for
// the error that the tests allow. Those of 32 codes lie together, the even ones before the odd ones.
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
    for (int h = 0; h < 2; h++) {  // w[2 k + h] holds cells 16 k + 8 h on, four to each quarter of the block
      const __m256i even = _mm256_packs_epi32(every_other<0>(w[h], w[2 + h]), every_other<0>(w[4 + h], w[6 + h]));
      const __m256i odd = _mm256_packs_epi32(every_other<1>(w[h], w[2 + h]), every_other<1>(w[4 + h], w[6 + h]));
      _mm256_storeu_si256(to + 2 * h, even);
      _mm256_storeu_si256(to + 2 * h + 1, odd);
      any = _mm256_or_si256(any, _mm256_or_si256(even, odd));
    }
    *used |= uint32_t(!_mm256_testz_si256(any, any)) << b;
  }
  return sum_of(sum);
}

// Sums weight * codeword of one component over the used blocks.
template <int Rows>
inline void add_component(const uint8_t* const* blocks, uint32_t used, int code_row, const int8_t* words,
                          const uint8_t* weights, __m256i (&sums)[Rows]) {
  const Table table = load_table(words);
  __m256i sum[Rows];
  for (__m256i& s : sum) s = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (uint32_t left = used; left; left &= left - 1) {
    const int b = __builtin_ctz(left);
    for (int h = 0; h < 2; h++) {
      const __m256i word = look_up_32(table, codes_of(load_bytes(blocks[b] + code_row * kLine + 32 * h)));
      const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(word, 8), 8), odd = _mm256_srai_epi16(word, 8);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; r++) {
        const uint8_t* w = weights + (r * kSuperblockCells + b * kLine + 32 * h) * 2;
        sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(even, load_bytes(w)));
        settle(sum[r]);
        sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(odd, load_bytes(w + 32)));
        settle(sum[r]);
      }
    }
  }
  for (int r = 0; r < Rows; r++) sums[r] = sum[r];
}

// For a subspace of eight numbers it takes less time to sum the weights of each of the 256 codes and to multiply these
// sums by the codewords than to look up eight numbers for every cell.
struct Bins {
  alignas(32) int32_t sums[256][kRowsAtOnce];       // of weights, by code
  alignas(32) float differences[kRowsAtOnce][128];  // by codeword: sum of the plain code less that of the negated one
};

// Copies the weights of the used blocks so that a cell's weights for all rows lie together.
void interleave(const uint8_t* weights, int n_rows, uint32_t used, __m128i* by_cell) {
  const __m256i zero = _mm256_setzero_si256();
  for (uint32_t left = used; left; left &= left - 1) {
    const int block = __builtin_ctz(left) * kLine;
    for (int i = 0; i < 4; i++) {  // sixteen cells: even or odd ones of half a block
      __m256i x[kRowsAtOnce];
      for (int r = 0; r < kRowsAtOnce; r++) {
        x[r] = r < n_rows ? load_bytes(weights + (r * kSuperblockCells + block + 16 * i) * 2) : zero;
      }
      const __m256i pairs[2][2] = {{_mm256_unpacklo_epi16(x[0], x[1]), _mm256_unpacklo_epi16(x[2], x[3])},
                                   {_mm256_unpackhi_epi16(x[0], x[1]), _mm256_unpackhi_epi16(x[2], x[3])}};
      for (int k = 0; k < 4; k++) {  // cells 2 k, 2 k + 1 and, in the upper lanes, 2 k + 8, 2 k + 9
        const __m256i* p = pairs[k / 2];
        const __m256i two = k % 2 ? _mm256_unpackhi_epi32(p[0], p[1]) : _mm256_unpacklo_epi32(p[0], p[1]);
        const __m256i first = _mm256_unpacklo_epi16(two, zero), second = _mm256_unpackhi_epi16(two, zero);
        __m128i* to = by_cell + block + 32 * (i / 2) + i % 2;
        _mm_store_si128(to + 2 * (2 * k), _mm256_castsi256_si128(first));
        _mm_store_si128(to + 2 * (2 * k + 1), _mm256_castsi256_si128(second));
        _mm_store_si128(to + 2 * (2 * k + 8), _mm256_extracti128_si256(first, 1));
        _mm_store_si128(to + 2 * (2 * k + 9), _mm256_extracti128_si256(second, 1));
      }
    }
  }
}

void fill_bins(const uint8_t* const* blocks, uint32_t used, int code_row, const __m128i* by_cell, Bins& bins) {
  __m128i* sums = reinterpret_cast<__m128i*>(bins.sums);
  for (int i = 0; i < 256; i++) _mm_store_si128(sums + i, _mm_setzero_si128());
  for (uint32_t left = used; left; left &= left - 1) {
    const int b = __builtin_ctz(left);
    for (int i = 0; i < kLine; i += 8) {
      uint64_t codes;
      __builtin_memcpy(&codes, blocks[b] + code_row * kLine + i, 8);
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) {
        __m128i* sum = sums + (codes >> (8 * j) & 255);
        _mm_store_si128(sum, _mm_add_epi32(_mm_load_si128(sum), by_cell[b * kLine + i + j]));
      }
    }
  }
  for (int word = 0; word < 128; word += 4) {
    __m128 x[4];
    for (int i = 0; i < 4; i++) x[i] = _mm_cvtepi32_ps(_mm_sub_epi32(sums[word + i], sums[word + i + 128]));
    _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
    for (int r = 0; r < kRowsAtOnce; r++) _mm_store_ps(bins.differences[r] + word, x[r]);
  }
}

// Multiplies the bins by the codewords of four components.
template <int Rows>
inline void add_bins(const Bins& bins, const int8_t* words, __m128 (&totals)[Rows]) {
  __m256 sum[4][Rows];
  for (int j = 0; j < 4; j++) {
    for (__m256& s : sum[j]) s = _mm256_setzero_ps();
  }
  for (int i = 0; i < 128; i += 8) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(words + j * 128 + i));
      const __m256 word = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#pragma GCC unroll 4
      for (int r = 0; r < Rows; r++) {
        sum[j][r] = _mm256_fmadd_ps(word, _mm256_load_ps(bins.differences[r] + i), sum[j][r]);
      }
    }
  }
  for (int r = 0; r < Rows; r++) {
    const __m256 ab = _mm256_hadd_ps(sum[0][r], sum[1][r]), cd = _mm256_hadd_ps(sum[2][r], sum[3][r]);
    const __m256 abcd = _mm256_hadd_ps(ab, cd);
    totals[r] = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
  }
}

// Sums weight * codeword of a group's components, looking up every cell.
template <int Rows>
inline void add_words(const uint8_t* const* blocks, uint32_t used, const ValueGroup& group, const int8_t* words,
                      const uint8_t* weights, __m128 (&totals)[Rows]) {
  __m256i part[4][Rows];
  for (int j = 0; j < 4; j++) {
    for (__m256i& sum : part[j]) sum = _mm256_setzero_si256();
    if (j >= group.components) continue;
    add_component(blocks, used, j < 2 ? group.code_row : group.code_row2, words + j * 128, weights, part[j]);
  }
  for (int r = 0; r < Rows; r++) {
    const __m256i ab = _mm256_hadd_epi32(part[0][r], part[1][r]), cd = _mm256_hadd_epi32(part[2][r], part[3][r]);
    // The two halves are added as floats: as integers their sum might overflow 32 bits.
    const __m256 abcd = _mm256_cvtepi32_ps(_mm256_hadd_epi32(ab, cd));
    totals[r] = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
  }
}

template <int Rows>
void add_rows(const uint8_t* const* blocks, uint32_t used, const int8_t* words, const ValueGroup* groups, int n_groups,
              const uint8_t* weights, const float* shrink, const float* factor, const Prefetch& prefetch, float* sums) {
  alignas(32) __m128i by_cell[kSuperblockCells];
  Bins bins;
  int binned = -1;  // the row of codes that `bins` was filled from
  for (int g = 0; g < n_groups; g++) {
    const ValueGroup group = groups[g];
    for (int b = 0; g < prefetch.lines && b < prefetch.n_blocks; b++) ask_for(prefetch.blocks[b] + g * kLine);
    if (g + 1 < n_groups && groups[g + 1].code_row == group.code_row) {
      if (binned < 0) interleave(weights, Rows, used, by_cell);
      binned = group.code_row;
      fill_bins(blocks, used, binned, by_cell, bins);
    }
    __m128 totals[Rows];
    if (group.code_row == binned) {
      add_bins(bins, words + group.component * 128, totals);
    } else {
      add_words(blocks, used, group, words + group.component * 128, weights, totals);
    }
    for (int r = 0; r < Rows; r++) {
      float* to = sums + (r * n_groups + g) * 16;
      const __m128 old = _mm_mul_ps(_mm_loadu_ps(to), _mm_set1_ps(shrink[r]));
      _mm_storeu_ps(to, _mm_fmadd_ps(totals[r], _mm_set1_ps(factor[r]), old));
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

const CodeOps kAvx2CodeOps{{14.98f, 14.98f}, lut_bytes, build_luts, look_up, value_scales, code_weights, add_values};

}  // namespace thimble
