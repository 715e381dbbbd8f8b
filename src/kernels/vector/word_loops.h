// The loops over 16-bit numbers that AVX2 and AVX-512 share. A unit first includes the header of its instruction set,
// which besides the names of math.h defines:
//
//   Ints                        a register of kLanes 32-bit numbers, or of kLanes pairs of 16-bit numbers
//   load_pairs(p)               kLanes pairs
//   pair_everywhere(p)          one pair in every lane
//   add_pair_products(sums, a, b)    adds to each lane the two products of its pairs
//   to_floats(x)                32-bit numbers as floats
//   store_words(p, x)           rounds kLanes floats that fit 16 bits
#pragma once

#include "kernels/vector/math.h"

namespace thimble {
namespace {

template <int Rows, int Columns>
inline void multiply_words_tile(const int16_t* a, int a_stride, const int16_t* b, int b_stride, int pairs, Lanes last,
                                const float* factor, const float* scale, const float* shrink, float* c, int c_stride) {
  Ints sums[Rows][Columns];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 4
    for (int j = 0; j < Columns; j++) sums[r][j] = Ints{};
  }
#pragma GCC unroll 1
  for (int i = 0; i < pairs; i++) {
    Ints column[Columns];
#pragma GCC unroll 4
    for (int j = 0; j < Columns; j++) column[j] = load_pairs(b + 2 * (i * b_stride + kLanes * j));
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) {
      const Ints x = pair_everywhere(a + 2 * (r * a_stride + i));
#pragma GCC unroll 4
      for (int j = 0; j < Columns; j++) add_pair_products(sums[r][j], x, column[j]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < Columns; j++) {
    const Floats s = Columns == 1 ? load(scale, last) : load(scale + kLanes * j);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) {
      float* to = c + r * c_stride + kLanes * j;
      Floats x = to_floats(sums[r][j]) * (s * all_of(factor[r]));
      if (shrink) x = fused(Columns == 1 ? load(to, last) : load(to), all_of(shrink[r]), x);
      if (Columns == 1) {
        store(to, x, last);
      } else {
        store(to, x);
      }
    }
  }
}

template <int Rows>
void multiply_words_rows(const int16_t* a, int a_stride, const int16_t* b, int b_stride, int rows, int pairs, int n,
                         const float* factor, const float* scale, const float* shrink, float* c, int c_stride) {
  for (; rows >= Rows; rows -= Rows) {
    int j = 0;
    for (; n - j >= kColumns * kLanes; j += kColumns * kLanes) {
      multiply_words_tile<Rows, kColumns>(a, a_stride, b + 2 * j, b_stride, pairs, first_lanes(kLanes), factor,
                                          scale + j, shrink, c + j, c_stride);
    }
    for (; j < n; j += kLanes) {
      multiply_words_tile<Rows, 1>(a, a_stride, b + 2 * j, b_stride, pairs, first_lanes(n - j), factor, scale + j,
                                   shrink, c + j, c_stride);
    }
    a += 2 * Rows * a_stride;
    c += Rows * c_stride;
    factor += Rows;
    if (shrink) shrink += Rows;
  }
  if constexpr (Rows > 1) {
    if (rows > 0) {
      multiply_words_rows<Rows - 1>(a, a_stride, b, b_stride, rows, pairs, n, factor, scale, shrink, c, c_stride);
    }
  }
}

void multiply_words(const int16_t* a, int a_stride, const int16_t* b, int b_stride, int rows, int pairs, int n,
                    const float* factor, const float* scale, const float* shrink, float* c, int c_stride) {
  multiply_words_rows<kMultiplyRows>(a, a_stride, b, b_stride, rows, pairs, n, factor, scale, shrink, c, c_stride);
}

float word_weights(const float* scores, float max, float lift, const float* scales, int16_t* weights) {
  Floats sum = all_of(0);
#pragma GCC unroll 4
  for (int i = 0; i < kLine; i += kLanes) {
    const Floats p = exp2_of(fused(load(scores + i) - all_of(max), all_of(kLog2e), all_of(lift)));
    sum = sum + p;
    store_words(weights + i, fused(p, load(scales + i), load(kDither.at + i)));
  }
  return sum_of(sum);
}

}  // namespace
}  // namespace thimble
