// The loops over tiles that are the same in every instruction set, written for vectors of any length (math.h).
#pragma once

#include "kernels/vector/math.h"

namespace thimble {
namespace {

// -- codec --

// Compares eight vectors of codewords at once. Of codewords that are equally near, the lowest index wins.
void nearest(const float* y, float inverse_rms, const float* words, const float* half_norms, int width, int n_subspaces,
             uint8_t* codes) {
  for (int m = 0; m < n_subspaces; m++, y += width, words += width * 128, half_norms += 128) {
    alignas(64) float all_dots[128];
    Best best;
#pragma GCC unroll 1
    for (int part = 0; part < 128; part += 8 * kLanes) {
      Floats dots[8];
      for (Floats& dot : dots) dot = all_of(0);
      for (int j = 0; j < width; j++) {
        const Floats z = all_of(y[j] * inverse_rms);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) dots[i] = dots[i] + z * load(words + j * 128 + part + kLanes * i);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        const int first = part + kLanes * i;
        store(all_dots + first, dots[i]);
        keep_better(magnitude(dots[i]) - load(half_norms + first), first, best);
      }
    }
    const int index = lowest_best(best);
    codes[m] = uint8_t(index | (all_dots[index] < 0 ? 0x80 : 0));
  }
}

// Multiplies `Rows` rows by `Columns` vectors of columns: one load of the matrix serves all rows. With one vector, only
// the lanes `last` are read and written.
template <int Rows, int Columns, bool Fused>
inline void multiply_tile(const float* a, int a_stride, const float* b, int b_stride, int k, Lanes last, float* c,
                          int c_stride, bool add) {
  Floats sums[Rows][Columns];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 4
    for (int j = 0; j < Columns; j++) {
      const float* from = c + r * c_stride + kLanes * j;
      sums[r][j] = !add ? all_of(0) : Columns == 1 ? load(from, last) : load(from);
    }
  }
  for (int i = 0; i < k; i++) {
    Floats row[Columns];
#pragma GCC unroll 4
    for (int j = 0; j < Columns; j++) {
      const float* from = b + i * b_stride + kLanes * j;
      row[j] = Columns == 1 ? load(from, last) : load(from);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) {
      const Floats x = all_of(a[r * a_stride + i]);
#pragma GCC unroll 4
      for (int j = 0; j < Columns; j++) sums[r][j] = Fused ? fused(x, row[j], sums[r][j]) : sums[r][j] + x * row[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 4
    for (int j = 0; j < Columns; j++) {
      float* to = c + r * c_stride + kLanes * j;
      if (Columns == 1) {
        store(to, sums[r][j], last);
      } else {
        store(to, sums[r][j]);
      }
    }
  }
}

template <int Rows, bool Fused>
void multiply_rows(const float* a, int a_stride, const float* b, int b_stride, int k, int n, float* c, int c_stride,
                   bool add) {
  int j = 0;
  for (; n - j >= kColumns * kLanes; j += kColumns * kLanes) {
    multiply_tile<Rows, kColumns, Fused>(a, a_stride, b + j, b_stride, k, first_lanes(kLanes), c + j, c_stride, add);
  }
  for (; j < n; j += kLanes) {
    multiply_tile<Rows, 1, Fused>(a, a_stride, b + j, b_stride, k, first_lanes(n - j), c + j, c_stride, add);
  }
}

// Goes `Rows` rows at a time (kMultiplyRows fill the registers), then does the rows that are left in one more pass.
template <int Rows, bool Fused>
void multiply_all(const float* a, int a_stride, const float* b, int b_stride, int rows, int k, int n, float* c,
                  int c_stride, bool add) {
  for (; rows >= Rows; rows -= Rows, a += Rows * a_stride, c += Rows * c_stride) {
    multiply_rows<Rows, Fused>(a, a_stride, b, b_stride, k, n, c, c_stride, add);
  }
  if constexpr (Rows > 1) {
    if (rows > 0) multiply_all<Rows - 1, Fused>(a, a_stride, b, b_stride, rows, k, n, c, c_stride, add);
  }
}

void multiply(const float* a, int a_stride, const float* b, int b_stride, int rows, int k, int n, float* c,
              int c_stride, bool add) {
  multiply_all<kMultiplyRows, true>(a, a_stride, b, b_stride, rows, k, n, c, c_stride, add);
}

void times_matrix(const float* x, int n_rows, const float* m, int dim, float* out) {
  multiply_all<kMultiplyRows, false>(x, dim, m, dim, n_rows, dim, dim, out, dim, false);
}

// The steps of a transform that stay within a vector.
template <int Half>
inline Floats butterflies(Floats x, int block) {
  if constexpr (Half < kLanes) {
    if (block > Half) x = butterfly<Half>(x);
    return butterflies<2 * Half>(x, block);
  } else {
    return x;
  }
}

void hadamard(float* x, int n, int block, float norm) {
  for (int i = 0; i < n; i += kLanes) {
    Floats v = butterflies<1>(load_lanes(x + i, n - i), block);
    if (block <= kLanes) v = v * all_of(norm);
    store_lanes(x + i, v, n - i);
  }
  for (int half = kLanes; half < block; half *= 2) {
    const Floats scale = all_of(half * 2 < block ? 1.0f : norm);
    for (int i = 0; i < n; i += 2 * half) {
      for (int j = i; j < i + half; j += kLanes) {
        const Floats a = load(x + j), b = load(x + j + half);
        store(x + j, (a + b) * scale);
        store(x + j + half, (a - b) * scale);
      }
    }
  }
}

// -- tiles --

// Transposes 16 rows of 16 bytes, in each lane of 128 bits by itself. If a byte's row and column are written as one
// number of 8 bits, each step rotates that number by one bit, so four steps exchange row and column.
inline void transpose_bytes(Bytes r[16]) {
#pragma GCC unroll 4
  for (int step = 0; step < 4; step++) {
    Bytes s[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) s[i] = r[i];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      r[2 * i] = zip_low(s[i], s[i + 8]);
      r[2 * i + 1] = zip_high(s[i], s[i + 8]);
    }
  }
}

void load_keys(const uint8_t* const* rows, int n, int dim, float* tile) {
  for (int cell = 0; cell < kLine; cell += kLanes) {
    for (int d = 0; d < dim; d += kLanes) {
      Floats r[kLanes];
      if (cell >= n) {  // a short context's only tile is mostly empty
        for (int i = 0; i < kLanes && d + i < dim; i++) store(tile + (d + i) * kLine + cell, all_of(0));
        continue;
      }
      for (int i = 0; i < kLanes; i++) {
        r[i] = cell + i < n ? load_halves(rows[cell + i] + 2 * d, dim - d) : all_of(0);
      }
      transpose(r);
      for (int i = 0; i < kLanes && d + i < dim; i++) store(tile + (d + i) * kLine + cell, r[i]);
    }
  }
}

void load_values(const uint8_t* const* rows, int n, int dim, float* tile) {
  for (int cell = 0; cell < n; cell++) {
    for (int d = 0; d < dim; d += kLanes) {
      store_lanes(tile + cell * dim + d, load_halves(rows[cell] + 2 * d, dim - d), dim - d);
    }
  }
}

// -- softmax --

inline float max_of_all(const Floats (&x)[kMaxima]) {
  Floats max = x[0];
#pragma GCC unroll 4
  for (int i = 1; i < kMaxima; i++) max = greater(x[i], max);
  return max_of(max);
}

template <bool Softcap, bool Masked, bool Weighted>
float finish(float* scores, int n_blocks, const uint64_t* visible, const uint16_t* const* masks, float bias,
             float slope, float softcap, const float* log_weight, float* max_log) {
  const Floats inverse_cap = all_of(Softcap ? 1.0f / softcap : 0.0f);
  Floats max[kMaxima], max_weighted[kMaxima];
#pragma GCC unroll 4
  for (int i = 0; i < kMaxima; i++) max[i] = max_weighted[i] = all_of(kUnseen);
  for (int b = 0; b < n_blocks; b++) {
#pragma GCC unroll 4
    for (int i = 0; i < kLine / kLanes; i++) {
      float* at = scores + b * kLine + kLanes * i;
      Floats s = load(at) + all_of(bias);
      if (Softcap) s = all_of(softcap) * tanh_of(s * inverse_cap);
      if (Masked) s = fused(load_half(masks[b] + kLanes * i), all_of(slope), s);
      s = choose(unsigned(visible[b] >> (kLanes * i)), s, all_of(kUnseen));
      store(at, s);
      max[i % kMaxima] = greater(s, max[i % kMaxima]);
      if (Weighted) {
        const Floats log = fused(s, all_of(kLog2e), load(log_weight + b * kLine + kLanes * i));
        max_weighted[i % kMaxima] = greater(log, max_weighted[i % kMaxima]);
      }
    }
  }
  if (Weighted) *max_log = max_of_all(max_weighted);
  return max_of_all(max);
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

// Works on negated scores, as `greater` can put -inf in the place of a NaN, but not +inf.
void best_of_rows(const float* scores, size_t stride, int n_rows, int n_cells, bool raises, float* best) {
  for (int i = 0; i < n_cells; i += kLanes) {
    Floats least = raises ? all_of(0) - load(best + i) : all_of(-kUnseen);
    for (int r = 0; r < n_rows; r++) {
      const Floats negated = all_of(0) - load(scores + r * stride + i);
      least = smaller(least, greater(negated, all_of(kUnseen)));
    }
    store(best + i, all_of(0) - least);
  }
}

void block_maxima(const float* scores, int n_blocks, float* maxima) {
  for (int b = 0; b < n_blocks; b++) {
    Floats max = load(scores + b * kLine);
    for (int i = kLanes; i < kLine; i += kLanes) max = greater(max, load(scores + b * kLine + i));
    maxima[b] = max_of(max);
  }
}

uint64_t at_least(const float* scores, float bound) {
  uint64_t bits = 0;
  for (int i = 0; i < kLine; i += kLanes) bits |= uint64_t(lanes_at_least(load(scores + i), all_of(bound))) << i;
  return bits;
}

float exponentiate(float* scores, int n_cells, float max) {
  Floats sum = all_of(0);
  for (int i = 0; i < n_cells; i += kLanes) {
    const Floats p = exp2_of((load(scores + i) - all_of(max)) * all_of(kLog2e));
    store(scores + i, p);
    sum = sum + p;
  }
  return sum_of(sum);
}

}  // namespace
}  // namespace thimble
