// Decode attention: products of query rows or outputs with a matrix of the codec.
#pragma once

#include <cstddef>

#include "cuda/attend/shared.h"
#include "cuda/simt/simt.h"

namespace thimble::cuda {

template <typename S>
struct RowsTimesMatrix {
  using Shared = AttendShared<S>;
  static constexpr int D = S::kHeadDim;

  /// Multiplies 4 rows in shared memory, float [4][D], with this head's matrix of `matrices`, [n_kv_heads][D][D].
  ///
  /// kParts threads share each component, each with its share of the terms, so that a thread waits for few loads in
  /// turn. Returns their partial sums, float [kParts][4][D] in shared memory, after a barrier: a component of the
  /// product is the sum of kParts numbers that lie 4 D floats apart.
  static constexpr int kParts = S::kThreads / D;
  SIMT static float* multiply(const float* rows, const float* matrices) {
    constexpr int kTerms = D / kParts;
    static_assert(kParts >= 1 && kParts * S::kRows * D * sizeof(float) <= sizeof(Shared::Results::sums));
    const float* matrix = matrices + size_t(simt::block_y()) * D * D;
    float* partial = simt::shared_at<float, offsetof(Shared, results.sums)>();
    const int thread = simt::thread_again(), d = thread % D, part = thread / D;
    float sum[S::kRows] = {};
    SIMT_UNROLL_BY(16)
    for (int k = 0; k < kTerms; k++) {
      const int i = part * kTerms + k;
      const float m = simt::load_constant(matrix + i * D + d);
      SIMT_UNROLL
      for (int r = 0; r < S::kRows; r++) sum[r] += rows[r * D + i] * m;
    }
    SIMT_UNROLL
    for (int r = 0; r < S::kRows; r++) partial[(part * S::kRows + r) * D + d] = sum[r];
    simt::sync();
    return partial;
  }
};

}  // namespace thimble::cuda
