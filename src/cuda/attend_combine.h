// Decode attention: adding up warps, then splits, and undoing the values' transform.
//
// Warps meet in shared memory; where the cells are split, thread blocks meet in global memory: the last one to arrive
// adds all splits up in their order, so results do not depend on timing.
#pragma once

#include "cuda/attend_cells.h"
#include "cuda/hadamard.h"

namespace thimble::cuda {

template <typename S>
struct AttendCombine {
  using Items = AttendItems<S>;
  using Cells = AttendCells<S>;
  using Lane = typename Cells::Lane;
  using Running = typename Cells::Running;
  static constexpr int D = S::kHeadDim;

  /// The sums of `n` parts, part i with maximum m(i), weight w(i) and value v(i), relative to the greatest maximum.
  /// Reads 8 parts at a time before it uses any: they come from far away.
  template <typename M, typename W, typename V>
  SIMT static void combine(int n, M m, W w, V v, float& maximum, float& weight, float& sum) {
    constexpr int kBatch = 8;
    maximum = Cells::kNone;
    weight = sum = 0;
    for (int first = 0; first < n; first += kBatch) {
      float maxima[kBatch], weights[kBatch], values[kBatch];
      SIMT_UNROLL
      for (int i = 0; i < kBatch; i++) {
        const bool there = first + i < n;
        maxima[i] = there ? m(first + i) : Cells::kNone;
        weights[i] = there ? w(first + i) : 0.0f;
        values[i] = there ? v(first + i) : 0.0f;
      }
      float top = maximum;
      SIMT_UNROLL
      for (int i = 0; i < kBatch; i++) top = fmaxf(top, maxima[i]);
      const float old = simt::exp2_fast(maximum - top);
      maximum = top;
      weight *= old;
      sum *= old;
      SIMT_UNROLL
      for (int i = 0; i < kBatch; i++) {
        const float factor = simt::exp2_fast(maxima[i] - maximum);
        weight += factor * weights[i];
        sum += factor * values[i];
      }
    }
  }

  /// Normalizes one output component (still transformed) and puts it where `write_output` looks for it.
  SIMT static void normalize(const AttendArgs& a, int r, int d, float maximum, float weight, float sum) {
    const int head = simt::block_y() / a.row_groups, row = simt::block_y() % a.row_groups * S::kRows + r;
    float total = weight;
    if (a.sinks) total += simt::exp2_fast(a.sinks[head * a.group + row % a.group] * Cells::kLog2e - maximum);
    const float inverse = total == 0 ? 0.0f : 1 / total;
    uint8_t* shared = simt::shared();
    reinterpret_cast<float*>(shared + S::kOutputs)[r * D + d] = sum * inverse;
    if (d == 0) reinterpret_cast<float*>(shared + S::kWeights)[r] = weight * inverse;
  }

  /// Undoes the values' transform and writes the 4 rows out.
  SIMT static void write_output(const AttendArgs& a, int stream) {
    const int head = simt::block_y() / a.row_groups, row_group = simt::block_y() % a.row_groups;
    const float* rows = reinterpret_cast<const float*>(simt::shared() + S::kOutputs);
    const float* weights = reinterpret_cast<const float*>(simt::shared() + S::kWeights);
    const auto target = [&](int r) -> float* {
      const int row = row_group * S::kRows + r, token = row / a.group;
      if (token >= a.n_tokens) return nullptr;
      const size_t at = (size_t(stream) * a.n_tokens + token) * a.n_kv_heads * a.group + head * a.group + row % a.group;
      return a.output + at * D;
    };
    if (a.value_codec.undo) {
      // Threads share each component's sum, so that few loads wait for one another.
      constexpr int kParts = S::kThreads / D, kTerms = D / kParts;
      const float* mean = a.value_codec.mean + head * D;
      const float* matrix = a.value_codec.undo + size_t(head) * D * D;
      float* partial = reinterpret_cast<float*>(simt::shared() + S::kSums);  // [kParts][4][D]
      static_assert(kParts >= 1 && kParts * S::kRows * D * 4 <= S::kSumsBytes);
      const int d = simt::thread() % D, part = simt::thread() / D;
      float sum[S::kRows] = {};
      SIMT_UNROLL_SOME
      for (int k = 0; k < kTerms; k++) {
        const int i = part * kTerms + k;
        const float m = simt::load_constant(matrix + i * D + d);
        SIMT_UNROLL
        for (int r = 0; r < S::kRows; r++) sum[r] += rows[r * D + i] * m;
      }
      SIMT_UNROLL
      for (int r = 0; r < S::kRows; r++) partial[(part * S::kRows + r) * D + d] = sum[r];
      simt::sync();
      for (int o = simt::thread(); o < S::kRows * D; o += S::kThreads) {
        const int r = o / D;
        float* out = target(r);
        if (!out) continue;
        float total = weights[r] * mean[o % D];
        SIMT_UNROLL
        for (int i = 0; i < kParts; i++) total += partial[i * S::kRows * D + o];
        out[o % D] = total;
      }
      simt::sync();  // the next score table takes this place
    } else {
      const int r = simt::thread() / 32, lane = simt::thread() % 32;
      if (r >= S::kRows) return;
      float x[D / 32];
      SIMT_UNROLL
      for (int i = 0; i < D / 32; i++) x[i] = rows[r * D + lane * (D / 32) + i];
      hadamard_warp<D>(x, lane);
      if (float* out = target(r)) {
        SIMT_UNROLL
        for (int i = 0; i < D / 32; i++) out[lane * (D / 32) + i] = x[i];
      }
    }
  }

  /// Adds the warps up; then either writes the output or leaves a partial result for the last block to arrive.
  SIMT static void finish_item(const AttendArgs& a, const Lane& l, Running& run, int item) {
    uint8_t* shared = simt::shared();
    float* sums = reinterpret_cast<float*>(shared + S::kSums);
    float* states = reinterpret_cast<float*>(shared + S::kStates);
    constexpr int W = S::kValueWidth, kStride = S::kSumStride;
    run.weight = Cells::over_g(run.weight, typename Cells::Add());
    simt::sync();  // the score table is used up
    SIMT_UNROLL
    for (int i = 0; i < Cells::kLaneSums; i++) {
      sums[(l.warp * S::kRows + l.t) * kStride + (l.g + i / W * 8) * W + i % W] = run.sum[i];
    }
    if (l.g == 0) {
      states[l.warp * 8 + l.t] = run.maximum;
      states[l.warp * 8 + 4 + l.t] = run.weight;
    }
    simt::sync();
    const int stream = Items::stream_of(a, item);
    const int pairs = a.n_kv_heads * a.row_groups;  // of KV head and row group
    float* partial =
        a.n_splits > 1 ? a.partials + (size_t(item) * pairs + simt::block_y()) * S::kPartialFloats : nullptr;
    for (int o = simt::thread(); o < S::kRows * D; o += S::kThreads) {
      const int r = o / D, d = o % D;
      float maximum, weight, sum;
      combine(
          S::kWarps, [&](int i) { return states[i * 8 + r]; }, [&](int i) { return states[i * 8 + 4 + r]; },
          [&](int i) { return sums[(i * S::kRows + r) * kStride + d]; }, maximum, weight, sum);
      if (partial) {
        partial[o] = sum;
        if (d == 0) {
          partial[S::kRows * D + r] = maximum;
          partial[S::kRows * D + S::kRows + r] = weight;
        }
      } else {
        normalize(a, r, d, maximum, weight, sum);
      }
    }
    if (partial) {
      int* last = reinterpret_cast<int*>(shared + S::kLast);
      simt::fence();
      simt::sync();
      int* arrived = a.arrived + size_t(stream) * pairs + simt::block_y();
      if (simt::thread() == 0) {
        *last = simt::atomic_add(arrived, 1) == a.n_splits - 1;
        if (*last) *arrived = 0;
      }
      simt::sync();
      if (!*last) return;  // all threads alike
      simt::fence();
      const size_t stride = size_t(pairs) * S::kPartialFloats;
      const float* first = a.partials + size_t(stream) * a.n_splits * stride + simt::block_y() * S::kPartialFloats;
      for (int o = simt::thread(); o < S::kRows * D; o += S::kThreads) {
        const int r = o / D, d = o % D;
        float maximum, weight, sum;
        combine(
            a.n_splits, [&](int i) { return simt::load_l2(first + i * stride + S::kRows * D + r); },
            [&](int i) { return simt::load_l2(first + i * stride + S::kRows * D + S::kRows + r); },
            [&](int i) { return simt::load_l2(first + i * stride + o); }, maximum, weight, sum);
        normalize(a, r, d, maximum, weight, sum);
      }
    }
    simt::sync();
    write_output(a, stream);
    if constexpr (!S::kOwnOutputs) simt::sync();
  }
};

}  // namespace thimble::cuda
