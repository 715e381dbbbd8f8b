// The Walsh-Hadamard rotation within a warp, bit for bit what Transform::hadamard computes: the same sums in the same
// order.
#pragma once

#include "cuda/simt.h"

namespace thimble::cuda {

/// In place. Lane i holds components i * N .. i * N + N - 1 of a vector of D = 32 N, a power of two. `Short`: as a
/// loop, where code that runs once or twice should be short.
template <int D, bool Short = false>
SIMT void hadamard_warp(float (&x)[D / 32], int lane) {
  constexpr int N = D / 32;
  SIMT_UNROLL
  for (int half = 1; half < N; half *= 2) {
    SIMT_UNROLL
    for (int i = 0; i < N; i++) {
      if (i & half) continue;
      const float a = x[i], b = x[i + half];
      x[i] = simt::add_rn(a, b);
      x[i + half] = simt::sub_rn(a, b);
    }
  }
  const auto exchange = [&](int mask) {
    SIMT_UNROLL
    for (int i = 0; i < N; i++) {
      const float other = simt::shuffle_xor(x[i], mask);
      x[i] = lane & mask ? simt::sub_rn(other, x[i]) : simt::add_rn(x[i], other);
    }
  };
  if constexpr (Short) {
    SIMT_NO_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) exchange(mask);
  } else {
    SIMT_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) exchange(mask);
  }
  // 1 / sqrt(D), rounded twice as on the CPU; the compiler does not work it out in advance.
  constexpr float norm = D == 64 ? 0.125f : D == 128 ? 0.0883883461f : 0.0625f;
  static_assert(D == 64 || D == 128 || D == 256);
  SIMT_UNROLL
  for (int i = 0; i < N; i++) x[i] = simt::mul_rn(x[i], norm);
}

}  // namespace thimble::cuda
