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

/// Adds up `n` parts, part i with maximum m(i), weight w(i) and sum v(i), relative to the greatest maximum. Reads 8
/// parts at a time before it uses any: they come from far away.
template <typename M, typename W, typename V>
SIMT Part combine(int n, M m, W w, V v) {
  constexpr int kBatch = 8;
  Part all;
  SIMT_NO_UNROLL
  for (int first = 0; first < n; first += kBatch) {
    float maxima[kBatch], weights[kBatch], sums[kBatch];
    SIMT_UNROLL
    for (int i = 0; i < kBatch; i++) {
      const bool there = first + i < n;
      maxima[i] = there ? m(first + i) : kNoMaximum;
      weights[i] = there ? w(first + i) : 0.0f;
      sums[i] = there ? v(first + i) : 0.0f;
    }
    float top = all.maximum;
    SIMT_UNROLL
    for (int i = 0; i < kBatch; i++) top = fmaxf(top, maxima[i]);
    const float old = simt::exp2_fast(all.maximum - top);
    all.maximum = top;
    all.weight *= old;
    all.sum *= old;
    SIMT_UNROLL
    for (int i = 0; i < kBatch; i++) {
      const float factor = simt::exp2_fast(maxima[i] - all.maximum);
      all.weight += factor * weights[i];
      all.sum += factor * sums[i];
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
