// Decode attention: partial results of a softmax, and how several make one.
#pragma once

#include <cmath>
#include <cstddef>

#include "cuda/attend/rows.h"
#include "cuda/attend/shared.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

inline constexpr float kNoMaximum = -1e30f;  // the maximum of no cells; finite, so that differences of maxima are

/// A query row's softmax over some cells, which a warp holds: sums and weight are relative to 2^maximum, and lane i has
/// the components i * N to i * N + N - 1.
template <int N>
struct RowPart {
  float maximum = kNoMaximum, weight = 0, sum[N] = {};
};

/// Adds up `n` parts of a row, relative to the greatest of their maxima. Part i has maximum m(i) and weight w(i);
/// v(i, to) writes its sums to `to`. All lanes of a warp call it: each lane takes the maximum and weight of another
/// part, and reads the sums of kAtOnce parts before it uses any, as they may come from global memory. A larger kAtOnce
/// would be faster here, but would take registers from the loop over cells.
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
    float greatest = fmaxf(all.maximum, maximum);
    SIMT_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) greatest = fmaxf(greatest, simt::shuffle_xor(greatest, mask));
    const float old = simt::exp2_fast(all.maximum - greatest), factor = simt::exp2_fast(maximum - greatest);
    float total = factor * weight;
    SIMT_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) total += simt::shuffle_xor(total, mask);
    all.maximum = greatest;
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

/// The warps' results, which they leave in shared memory (Shared::Results) to be added up.
template <typename S>
struct WarpParts {
  using Shared = AttendShared<S>;
  static constexpr int N = S::kHeadDim / 32;

  SIMT static float* sums(int warp, int row) {
    return simt::shared_at<float, offsetof(Shared, results.sums)>() + (warp * S::kRows + row) * Shared::kSumStride;
  }
  SIMT static void leave_state(int warp, int row, float maximum, float weight) {
    float* states = simt::shared_at<float, offsetof(Shared, results.states)>() + warp * 2 * S::kRows + row;
    states[0] = maximum;
    states[S::kRows] = weight;
  }
  /// Adds up a query row's results of n_warps warps from first_warp on. All lanes of a warp call it.
  SIMT static RowPart<N> add_up(int first_warp, int n_warps, int row, int lane) {
    if constexpr (S::kDirect) {  // few warps each
      RowPart<N> all[1];
      const int first_warps[1] = {first_warp};
      add_up_few(first_warps, n_warps, row, lane, all);
      return all[0];
    }
    const float* states = simt::shared_at<float, offsetof(Shared, results.states)>() + first_warp * 2 * S::kRows + row;
    return combine<N>(
        n_warps, [&](int w) { return states[w * 2 * S::kRows]; },
        [&](int w) { return states[w * 2 * S::kRows + S::kRows]; },
        [&](int w, float(&to)[N]) { read_floats(sums(first_warp + w, row) + lane * N, to); });
  }
  /// The same for a row of several items, each the sum of a few warps' results from first_warps[k] on. The loads of all
  /// items are under way together; for few warps this takes fewer instructions than combine.
  template <int Rows>
  SIMT static void add_up_few(const int (&first_warps)[Rows], int n_warps, int row, int lane, RowPart<N> (&all)[Rows]) {
    const float* states = simt::shared_at<float, offsetof(Shared, results.states)>() + row;
    SIMT_NO_UNROLL
    for (int w = 0; w < n_warps; w++) {
      SIMT_UNROLL
      for (int k = 0; k < Rows; k++) {
        const int warp = first_warps[k] + w;
        float sum[N];
        read_floats(sums(warp, row) + lane * N, sum);
        const float maximum = states[warp * 2 * S::kRows], greatest = fmaxf(all[k].maximum, maximum);
        const float old = simt::exp2_fast(all[k].maximum - greatest), factor = simt::exp2_fast(maximum - greatest);
        all[k].maximum = greatest;
        all[k].weight = all[k].weight * old + factor * states[warp * 2 * S::kRows + S::kRows];
        SIMT_UNROLL
        for (int i = 0; i < N; i++) all[k].sum[i] = all[k].sum[i] * old + factor * sum[i];
      }
    }
  }
};

/// Results that thread blocks leave in global memory to be added up, AttendArgs::partials: for each stream those of its
/// splits, then that of its exact rows. A result is float sums [4][D], maxima [4], weights [4].
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
