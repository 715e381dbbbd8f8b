// Transforms of many rows of queries or outputs: the kernel's body. Grid [n_kv_heads][blocks of kTransformRows rows]. A
// thread computes one component of all rows, so that each number of the matrix is read once for all of them.
#pragma once

#include "cuda/encode/hadamard.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

inline constexpr int kTransformRows = 16;

template <int HeadDim>
struct TransformKernel {
  static constexpr int D = HeadDim, kRows = kTransformRows;
  static constexpr size_t kSharedBytes = size_t(kRows) * D * sizeof(float);

  SIMT static void run(const TransformArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const int head = simt::block_y(), thread = simt::thread();
    const int first = simt::block_x() * kRows, left = a.n_streams * a.n_tokens * a.group - first;
    const int n = left < kRows ? left : kRows;
    float* x = reinterpret_cast<float*>(simt::shared());  // [kRows][D]
    // Rows of a KV head: stream, then token, then head within the group.
    const auto in_stream = [&](int i) { return (first + i) / a.group % a.n_tokens; };
    const auto stream = [&](int i) { return (first + i) / a.group / a.n_tokens; };
    const auto query_head = [&](int i) { return head * a.group + (first + i) % a.group; };
    for (int i = 0; i < kRows; i++) {
      x[i * D + thread] = i < n ? a.in[stream(i) * a.stream_stride + in_stream(i) * a.token_stride +
                                       query_head(i) * a.head_stride + thread]
                                : 0.0f;
    }
    simt::sync();
    float y[kRows] = {};
    const float* matrix = a.codec.undo ? a.codec.undo + size_t(head) * D * D : nullptr;
    if (matrix) {
      for (int k = 0; k < D; k++) {
        const float m = simt::load_constant(matrix + k * D + thread);
        SIMT_UNROLL
        for (int i = 0; i < kRows; i++) y[i] += x[i * D + k] * m;
      }
    } else {
      const int lane = thread % 32;
      for (int i = thread / 32; i < kRows; i += D / 32) {
        float v[1][D / 32];
        SIMT_UNROLL
        for (int k = 0; k < D / 32; k++) v[0][k] = x[i * D + lane * (D / 32) + k];
        hadamard_warp<D>(v, lane);
        SIMT_UNROLL
        for (int k = 0; k < D / 32; k++) x[i * D + lane * (D / 32) + k] = v[0][k];
      }
      simt::sync();
      SIMT_UNROLL
      for (int i = 0; i < kRows; i++) y[i] = x[i * D + thread];
    }
    const float mean = a.add_mean && a.codec.mean ? simt::load_constant(a.codec.mean + head * D + thread) : 0.0f;
    SIMT_UNROLL
    for (int i = 0; i < kRows; i++) {
      if (i >= n) break;
      const size_t row = size_t(stream(i)) * a.n_tokens + in_stream(i);
      a.out[(row * a.n_kv_heads * a.group + query_head(i)) * D + thread] = y[i] + mean;
    }
  }
};

}  // namespace thimble::cuda
