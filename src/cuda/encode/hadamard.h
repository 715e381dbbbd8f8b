// The Walsh-Hadamard rotation within a warp, bit for bit what Transform::hadamard computes: the same sums in the same
// order.
#pragma once

#include "cuda/simt/simt.h"

namespace thimble::cuda {

/// Rotates `Rows` vectors in place. Their shuffles are under way together. Lane i holds the components i * N to
/// i * N + N - 1 of each vector of D = 32 N components, a power of two.
template <int D, int Rows>
SIMT void hadamard_warp(float (&rows)[Rows][D / 32], int lane) {
  constexpr int N = D / 32;
  SIMT_UNROLL
  for (int half = 1; half < N; half *= 2) {
    SIMT_UNROLL
    for (int i = 0; i < Rows * N; i++) {
      float* x = rows[i / N];
      if (i % N & half) continue;
      const float a = x[i % N], b = x[i % N + half];
      x[i % N] = simt::add_rn(a, b);
      x[i % N + half] = simt::sub_rn(a, b);
    }
  }
  SIMT_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) {
    const float sign = lane & mask ? -1.0f : 1.0f;  // one fused instruction adds or subtracts, with one rounding
    SIMT_UNROLL
    for (int i = 0; i < Rows * N; i++) {
      float& x = rows[i / N][i % N];
      x = simt::fma_rn(x, sign, simt::shuffle_xor(x, mask));
    }
  }
  // 1 / sqrt(D), rounded twice as on the CPU. It is written out as the compiler would not compute it in advance.
  constexpr float norm = D == 64 ? 0.125f : D == 128 ? 0.0883883461f : 0.0625f;
  static_assert(D == 64 || D == 128 || D == 256);
  SIMT_UNROLL
  for (int i = 0; i < Rows * N; i++) rows[i / N][i % N] = simt::mul_rn(rows[i / N][i % N], norm);
}

}  // namespace thimble::cuda
