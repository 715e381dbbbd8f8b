// Decode attention: partial results of a softmax, and how several make one.
#pragma once

#include "cuda/attend/shape.h"
#include "cuda/simt/simt.h"

namespace thimble::cuda {

inline constexpr float kNoMaximum = -1e30f;  // of no cells at all: finite, so that differences are

/// A query row's softmax over some cells, which a warp holds: sums and weight are relative to 2^maximum, and lane i has
/// the components i * N to i * N + N - 1.
template <int N>
struct RowPart {
  float maximum = kNoMaximum, weight = 0, sum[N] = {};
};

/// `N` adjacent floats, 2, 4 or 8; by way of L2 if other thread blocks wrote them.
template <int N, bool FromL2 = false>
SIMT void read_floats(const float* from, float (&to)[N]) {
  if constexpr (N == 2) {
    const float2 v =
        FromL2 ? simt::load_l2(reinterpret_cast<const float2*>(from)) : *reinterpret_cast<const float2*>(from);
    to[0] = v.x;
    to[1] = v.y;
  } else {
    SIMT_UNROLL
    for (int i = 0; i < N; i += 4) {
      const float4* at = reinterpret_cast<const float4*>(from + i);
      const float4 v = FromL2 ? simt::load_l2(at) : *at;
      to[i] = v.x;
      to[i + 1] = v.y;
      to[i + 2] = v.z;
      to[i + 3] = v.w;
    }
  }
}
template <int N>
SIMT void write_floats(float* to, const float (&from)[N]) {
  if constexpr (N == 2) {
    *reinterpret_cast<float2*>(to) = make_float2(from[0], from[1]);
  } else {
    SIMT_UNROLL
    for (int i = 0; i < N; i += 4) {
      *reinterpret_cast<float4*>(to + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
    }
  }
}

/// Adds up `n` parts of a row, part i with maximum m(i), weight w(i) and sums v(i, where they go), relative to the
/// greatest maximum. A warp's lanes call it together: each looks at another part's maximum and weight, and reads the
/// sums of a few parts before it uses any, as they may come from far away. More of them would be faster here, but take
/// registers that the compiler then lacks in the loop over cells.
template <int N, typename M, typename W, typename V>
SIMT RowPart<N> combine(int n, M m, W w, V v) {
  constexpr int kAtOnce = 4;
  const int lane = simt::thread_again() % 32;
  RowPart<N> all;
  float sums[kAtOnce][N];
  const auto read = [&](int first) {
    SIMT_UNROLL
    for (int i = 0; i < kAtOnce; i++) {
      if (first + i < n) v(first + i, sums[i]);
    }
  };
  SIMT_NO_UNROLL
  for (int first = 0; first < n; first += 32) {
    const bool there = first + lane < n;
    const float maximum = there ? m(first + lane) : kNoMaximum, weight = there ? w(first + lane) : 0.0f;
    read(first);
    float top = fmaxf(all.maximum, maximum);
    SIMT_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) top = fmaxf(top, simt::shuffle_xor(top, mask));
    const float old = simt::exp2_fast(all.maximum - top), factor = simt::exp2_fast(maximum - top);
    float total = factor * weight;
    SIMT_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) total += simt::shuffle_xor(total, mask);
    all.maximum = top;
    all.weight = all.weight * old + total;
    SIMT_UNROLL
    for (int i = 0; i < N; i++) all.sum[i] *= old;
    SIMT_NO_UNROLL
    for (int batch = first; batch < n && batch < first + 32; batch += kAtOnce) {
      if (batch > first) read(batch);
      SIMT_UNROLL
      for (int i = 0; i < kAtOnce; i++) {
        if (batch + i >= n) break;
        const float f = simt::shuffle(factor, batch + i - first);
        SIMT_UNROLL
        for (int j = 0; j < N; j++) all.sum[j] += f * sums[i][j];
      }
    }
  }
  return all;
}

/// Warps' results of one query row each leave in shared memory, for those who add them up.
template <typename S>
struct WarpParts {
  static constexpr int N = S::kHeadDim / 32;

  SIMT static float* sums(int warp, int row) {
    return reinterpret_cast<float*>(simt::shared() + S::kSums) + (warp * S::kRows + row) * S::kSumStride;
  }
  SIMT static void leave_state(int warp, int row, float maximum, float weight) {
    float* states = reinterpret_cast<float*>(simt::shared() + S::kStates) + warp * 2 * S::kRows + row;
    states[0] = maximum;
    states[S::kRows] = weight;
  }
  /// The sum of n_warps warps' results from first_warp on; a warp calls it.
  SIMT static RowPart<N> add_up(int first_warp, int n_warps, int row, int lane) {
    if constexpr (S::kDirect) {  // few warps each
      RowPart<N> all[1];
      const int first_warps[1] = {first_warp};
      add_up_few(first_warps, n_warps, row, lane, all);
      return all[0];
    }
    const float* states = reinterpret_cast<const float*>(simt::shared() + S::kStates) + first_warp * 2 * S::kRows + row;
    return combine<N>(
        n_warps, [&](int w) { return states[w * 2 * S::kRows]; },
        [&](int w) { return states[w * 2 * S::kRows + S::kRows]; },
        [&](int w, float(&to)[N]) { read_floats(sums(first_warp + w, row) + lane * N, to); });
  }
  /// The same for several items' rows, each the sum of few warps' from first_warps[k] on: these wait for one another's
  /// loads together, and a warp after the other is less work than combine's maxima and sums over lanes.
  template <int Rows>
  SIMT static void add_up_few(const int (&first_warps)[Rows], int n_warps, int row, int lane, RowPart<N> (&all)[Rows]) {
    const float* states = reinterpret_cast<const float*>(simt::shared() + S::kStates) + row;
    SIMT_NO_UNROLL
    for (int w = 0; w < n_warps; w++) {
      SIMT_UNROLL
      for (int k = 0; k < Rows; k++) {
        const int warp = first_warps[k] + w;
        float sum[N];
        read_floats(sums(warp, row) + lane * N, sum);
        const float maximum = states[warp * 2 * S::kRows], top = fmaxf(all[k].maximum, maximum);
        const float old = simt::exp2_fast(all[k].maximum - top), factor = simt::exp2_fast(maximum - top);
        all[k].maximum = top;
        all[k].weight = all[k].weight * old + factor * states[warp * 2 * S::kRows + S::kRows];
        SIMT_UNROLL
        for (int i = 0; i < N; i++) all[k].sum[i] = all[k].sum[i] * old + factor * sum[i];
      }
    }
  }
};

/// What thread blocks leave for one another in global memory: for each stream its splits' results, then its exact
/// rows': sums [4][D], then maxima and weights.
template <typename S>
struct AttendPartials {
  static constexpr int D = S::kHeadDim, N = D / 32;

  SIMT static float* at(const AttendArgs& a, int stream, int i) {
    const bool has_exact = a.exact[0].capacity + a.exact[1].capacity > 0;
    const size_t part = size_t(stream) * (a.n_splits + has_exact) + i;
    return a.partials +
           (part * a.n_kv_heads * a.row_groups + simt::block_y() * a.row_groups + simt::block_z()) * S::kPartialFloats;
  }
  SIMT static void leave(float* at, int row, int lane, const RowPart<N>& part) {
    write_floats(at + row * D + lane * N, part.sum);
    if (lane != 0) return;
    at[S::kRows * D + row] = part.maximum;
    at[S::kRows * D + S::kRows + row] = part.weight;
  }
  SIMT static float maximum(const float* at, int row) { return simt::load_l2(at + S::kRows * D + row); }
  SIMT static float weight(const float* at, int row) { return simt::load_l2(at + S::kRows * D + S::kRows + row); }
  SIMT static void sums(const float* at, int row, int lane, float (&to)[N]) {
    read_floats<N, true>(at + row * D + lane * N, to);
  }
  SIMT static RowPart<N> part(const float* at, int row, int lane) {
    RowPart<N> p{maximum(at, row), weight(at, row)};
    sums(at, row, lane, p.sum);
    return p;
  }
};

}  // namespace thimble::cuda
