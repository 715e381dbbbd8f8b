// Transforms of many rows of queries or outputs: the kernel's body. Grid [n_kv_heads][blocks of kTransformRows rows].
// Of a matrix, a thread computes one component of all rows, so that each of its numbers is read once for all of them.
// The Hadamard rotation takes a warp for a row, and no shared memory.
#pragma once

#include "cuda/encode/hadamard.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

inline constexpr int kTransformRows = 16;

template <int HeadDim>
struct TransformKernel {
  static constexpr int D = HeadDim, kRows = kTransformRows, kWarps = D / 32;
  static constexpr size_t kSharedBytes = size_t(kRows) * D * sizeof(float);

  /// The rows of a thread block: stream, then token, then head within the group.
  struct Rows {
    const TransformArgs& a;
    int head, first, n;

    SIMT int token(int i) const { return (first + i) / a.group % a.n_tokens; }
    SIMT int stream(int i) const { return (first + i) / a.group / a.n_tokens; }
    SIMT int query_head(int i) const { return head * a.group + (first + i) % a.group; }
    SIMT const float* in(int i) const {
      return a.in + stream(i) * a.stream_stride + token(i) * a.token_stride + query_head(i) * a.head_stride;
    }
    SIMT float* out(int i) const {
      return a.out + ((size_t(stream(i)) * a.n_tokens + token(i)) * a.n_kv_heads * a.group + query_head(i)) * D;
    }
  };

  SIMT static void run(const TransformArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const int first = simt::block_x() * kRows, left = a.n_streams * a.n_tokens * a.group - first;
    const Rows rows{a, simt::block_y(), first, left < kRows ? left : kRows};
    if (a.codec.undo) {
      multiply(rows);
    } else if (((reinterpret_cast<uintptr_t>(a.in) | reinterpret_cast<uintptr_t>(a.out)) % 16 |
                (a.stream_stride | a.token_stride | a.head_stride) % 4) == 0) {
      rotate<true>(rows);
    } else {
      rotate<false>(rows);
    }
  }

private:
  SIMT static float mean(const TransformArgs& a, int head, int d) {
    return a.add_mean && a.codec.mean ? simt::load_constant(a.codec.mean + head * D + d) : 0.0f;
  }

  SIMT static void multiply(const Rows& rows) {
    const int thread = simt::thread();
    float* x = reinterpret_cast<float*>(simt::shared());  // [kRows][D]
    for (int i = 0; i < kRows; i++) x[i * D + thread] = i < rows.n ? rows.in(i)[thread] : 0.0f;
    simt::sync();
    float y[kRows] = {};
    const float* matrix = rows.a.codec.undo + size_t(rows.head) * D * D;
    for (int k = 0; k < D; k++) {
      const float m = simt::load_constant(matrix + k * D + thread);
      SIMT_UNROLL
      for (int i = 0; i < kRows; i++) y[i] += x[i * D + k] * m;
    }
    const float add = mean(rows.a, rows.head, thread);
    SIMT_UNROLL
    for (int i = 0; i < kRows; i++) {
      if (i < rows.n) rows.out(i)[thread] = y[i] + add;
    }
  }

  /// `Aligned`: rows begin at multiples of 16 bytes.
  template <bool Aligned>
  SIMT static void rotate(const Rows& rows) {
    constexpr int N = D / 32, kTogether = kRows / kWarps < 4 ? kRows / kWarps : 4;
    const int lane = simt::thread() % 32;
    SIMT_NO_UNROLL
    for (int i = simt::thread() / 32 * kTogether; i < kRows; i += kWarps * kTogether) {
      float v[kTogether][N];
      SIMT_UNROLL
      for (int r = 0; r < kTogether; r++) {
        SIMT_UNROLL
        for (int k = 0; k < N; k++) v[r][k] = 0;
        if (i + r < rows.n) copy<Aligned>(v[r], rows.in(i + r) + lane * N);
      }
      hadamard_warp<D>(v, lane);
      SIMT_UNROLL
      for (int r = 0; r < kTogether; r++) {
        SIMT_UNROLL
        for (int k = 0; k < N; k++) v[r][k] += mean(rows.a, rows.head, lane * N + k);
        if (i + r < rows.n) copy<Aligned>(rows.out(i + r) + lane * N, v[r]);
      }
    }
  }

  template <bool Aligned>
  SIMT static void copy(float* to, const float* from) {
    constexpr int N = D / 32, kVector = N < 4 ? N : 4;
    struct alignas(kVector * sizeof(float)) Vector {
      float x[kVector];
    };
    SIMT_UNROLL
    for (int k = 0; k < N; k += kVector) {
      if constexpr (Aligned) {
        *reinterpret_cast<Vector*>(to + k) = *reinterpret_cast<const Vector*>(from + k);
      } else {
        SIMT_UNROLL
        for (int j = 0; j < kVector; j++) to[k + j] = from[k + j];
      }
    }
  }
};

}  // namespace thimble::cuda
