// Decode attention: partial results of a softmax, and how several make one.
#pragma once

#include "cuda/attend_shape.h"
#include "cuda/simt.h"

namespace thimble::cuda {

inline constexpr float kNoMaximum = -1e30f;  // of no cells at all: finite, so that differences are

/// One number of an output: sum and weight are relative to 2^maximum.
struct Part {
  float maximum = kNoMaximum, weight = 0, sum = 0;
};

/// Adds up `n` parts, part i with maximum m(i), weight w(i) and this lane's sum v(i), relative to the greatest maximum.
/// A warp's lanes call it together, for numbers that share the maxima and weights: each looks at another part's, and
/// reads 8 sums before it uses any, as they come from far away.
template <typename M, typename W, typename V>
SIMT Part combine(int n, M m, W w, V v) {
  constexpr int kBatch = 8;
  const int lane = simt::thread_again() % 32;
  Part all;
  SIMT_NO_UNROLL
  for (int first = 0; first < n; first += 32) {
    const bool there = first + lane < n;
    const float maximum = there ? m(first + lane) : kNoMaximum, weight = there ? w(first + lane) : 0.0f;
    float top = fmaxf(all.maximum, maximum);
    SIMT_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) top = fmaxf(top, simt::shuffle_xor(top, mask));
    const float old = simt::exp2_fast(all.maximum - top), factor = simt::exp2_fast(maximum - top);
    float total = factor * weight;
    SIMT_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) total += simt::shuffle_xor(total, mask);
    all.maximum = top;
    all.weight = all.weight * old + total;
    all.sum *= old;
    SIMT_NO_UNROLL
    for (int batch = first; batch < n && batch < first + 32; batch += kBatch) {
      float sums[kBatch];
      SIMT_UNROLL
      for (int i = 0; i < kBatch; i++) sums[i] = batch + i < n ? v(batch + i) : 0.0f;
      SIMT_UNROLL
      for (int i = 0; i < kBatch; i++) all.sum += simt::shuffle(factor, batch + i - first) * sums[i];
    }
  }
  return all;
}

/// What thread blocks leave for one another in global memory: for each stream its splits' results, then its exact
/// rows'. Component o = r * D + d is query row r's d-th.
template <typename S>
struct AttendPartials {
  static constexpr int D = S::kHeadDim;

  SIMT static float* at(const AttendArgs& a, int stream, int i) {
    const bool has_exact = a.exact[0].capacity + a.exact[1].capacity > 0;
    const size_t part = size_t(stream) * (a.n_splits + has_exact) + i;
    return a.partials +
           (part * a.n_kv_heads * a.row_groups + simt::block_y() * a.row_groups + simt::block_z()) * S::kPartialFloats;
  }
  SIMT static void leave(float* at, int o, const Part& part) {
    at[o] = part.sum;
    if (o % D != 0) return;
    at[S::kRows * D + o / D] = part.maximum;
    at[S::kRows * D + S::kRows + o / D] = part.weight;
  }
  SIMT static float maximum(const float* at, int o) { return simt::load_l2(at + S::kRows * D + o / D); }
  SIMT static float weight(const float* at, int o) { return simt::load_l2(at + S::kRows * D + S::kRows + o / D); }
  SIMT static float sum(const float* at, int o) { return simt::load_l2(at + o); }
};

}  // namespace thimble::cuda
