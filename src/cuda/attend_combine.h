// Decode attention: adding up warps, then splits, and undoing the values' transform.
//
// Warps meet in shared memory; where the cells are split, thread blocks meet in global memory: the last one to arrive
// adds all splits up in their order, so results do not depend on timing.
#pragma once

#include "cuda/attend_exact.h"

namespace thimble::cuda {

template <typename S>
struct AttendCombine {
  using Items = AttendItems<S>;
  using Tables = AttendTables<S>;
  using Cells = AttendCells<S>;
  using Lane = typename Cells::Lane;
  using Running = typename Cells::Running;
  using Exact = AttendExact<S>;
  using Partials = AttendPartials<S>;
  static constexpr int D = S::kHeadDim;

  /// Normalizes one output component, coded (still transformed) and exact, and puts them where `write_output` looks for
  /// them.
  SIMT static void normalize(const AttendArgs& a, int slot, int o, const Part& coded, const Part& exact) {
    const int r = o / D, row = slot * S::kRows + r;
    const float maximum = fmaxf(coded.maximum, exact.maximum);
    const float c = simt::exp2_fast(coded.maximum - maximum), e = simt::exp2_fast(exact.maximum - maximum);
    float total = c * coded.weight + e * exact.weight;
    if (a.sinks) total += simt::exp2_fast(a.sinks[Items::query_row(a, r).head] * Cells::kLog2e - maximum);
    const float inverse = total == 0 ? 0.0f : 1 / total;
    uint8_t* shared = simt::shared();
    const int at = slot * S::kRows * D + o;
    reinterpret_cast<float*>(shared + S::kCodedOutputs)[at] = c * coded.sum * inverse;
    reinterpret_cast<float*>(shared + S::kExactOutputs)[at] = e * exact.sum * inverse;
    if (o % D == 0) reinterpret_cast<float*>(shared + S::kWeights)[row] = c * coded.weight * inverse;
  }

  /// Undoes the values' transform and writes a batch's rows out.
  SIMT static void write_output(const AttendArgs& a, int batch) {
    const int head = simt::block_y(), n_slots = Items::n_slots(a, batch);
    const float* coded = reinterpret_cast<const float*>(simt::shared() + S::kCodedOutputs);
    const float* weights = reinterpret_cast<const float*>(simt::shared() + S::kWeights);
    const float* exact = reinterpret_cast<const float*>(simt::shared() + S::kExactOutputs);
    const auto target = [&](int slot, int r) -> float* {
      const auto row = Items::query_row(a, r);
      if (row.token >= a.n_tokens) return nullptr;
      const int stream = Items::stream_of(a, Items::first_item(a, batch) + slot);
      return a.output + ((size_t(stream) * a.n_tokens + row.token) * a.n_kv_heads * a.group + row.head) * D;
    };
    if (a.value_codec.undo) {
      const float* mean = a.value_codec.mean + head * D;
      SIMT_NO_UNROLL
      for (int slot = 0; slot < n_slots; slot++) {
        const float* partial = Tables::multiply_rows(coded + slot * S::kRows * D, a.value_codec.undo);
        SIMT_NO_UNROLL
        for (int o = simt::thread_again(); o < S::kRows * D; o += S::kThreads) {
          const int r = o / D;
          float* out = target(slot, r);
          if (!out) continue;
          float total = exact[slot * S::kRows * D + o] + weights[slot * S::kRows + r] * mean[o % D];
          SIMT_UNROLL
          for (int i = 0; i < Tables::kParts; i++) total += partial[i * S::kRows * D + o];
          out[o % D] = total;
        }
        simt::sync();  // the next product or table takes this place
      }
    } else {
      const int thread = simt::thread_again(), lane = thread % 32;
      SIMT_NO_UNROLL
      for (int row = thread / 32; row < n_slots * S::kRows; row += S::kWarps) {
        float x[D / 32];
        SIMT_UNROLL
        for (int i = 0; i < D / 32; i++) x[i] = coded[row * D + lane * (D / 32) + i];
        hadamard_warp<D, true>(x, lane);
        if (float* out = target(row / S::kRows, row % S::kRows)) {
          SIMT_UNROLL
          for (int i = 0; i < D / 32; i++) {
            out[lane * (D / 32) + i] = x[i] + exact[row * D + lane * (D / 32) + i];
          }
        }
      }
    }
  }

  /// Adds the warps of each item up; then either normalizes or leaves a partial result for the last block to arrive.
  /// Returns whether the outputs are there, after a barrier.
  SIMT static bool finish_batch(const AttendArgs& a, const Lane& l, Running& run, int batch) {
    uint8_t* shared = simt::shared();
    float* sums = reinterpret_cast<float*>(shared + S::kSums);
    float* states = reinterpret_cast<float*>(shared + S::kStates);
    constexpr int W = S::kValueWidth, kStride = S::kSumStride;
    run.weight = Cells::over_g(run.weight, typename Cells::Add());
    simt::sync();  // the keys' table is used up
    SIMT_UNROLL
    for (int i = 0; i < Cells::kLaneSums; i++) {
      sums[(l.warp * S::kRows + l.t) * kStride + (l.g + i / W * 8) * W + i % W] = run.sum[i];
    }
    if (l.g == 0) {
      states[l.warp * 8 + l.t] = run.maximum;
      states[l.warp * 8 + 4 + l.t] = run.weight;
    }
    simt::sync();
    const int item = Items::first_item(a, batch), stream = Items::stream_of(a, item),
              split = item - stream * a.n_splits;
    const int pairs = a.n_kv_heads * a.row_groups;  // of KV head and row group
    const int n_warps = Items::n_warps(a), n_slots = Items::n_slots(a, batch);
    const auto exact_part = [&](int slot, int o) {
      const float* at = Partials::at(a, stream + slot, a.n_splits);
      return Exact::any(a) ? Part{Partials::maximum(at, o), Partials::weight(at, o), Partials::sum(at, o)} : Part();
    };
    SIMT_NO_UNROLL
    for (int i = simt::thread_again(); i < n_slots * S::kRows * D; i += S::kThreads) {
      const int slot = i / (S::kRows * D), o = i % (S::kRows * D), r = o / D, d = o % D, first = slot * n_warps;
      const Part part = combine(
          n_warps, [&](int w) { return states[(first + w) * 8 + r]; },
          [&](int w) { return states[(first + w) * 8 + 4 + r]; },
          [&](int w) { return sums[((first + w) * S::kRows + r) * kStride + d]; });
      if (a.n_splits == 1) {
        normalize(a, slot, o, part, exact_part(slot, o));
      } else {
        Partials::leave(Partials::at(a, stream, split), o, part);
      }
    }
    if (a.n_splits > 1) {
      int* last = reinterpret_cast<int*>(shared + S::kLast);
      simt::fence();
      simt::sync();
      int* arrived = a.arrived + size_t(stream) * pairs + Items::pair(a);
      if (simt::thread() == 0) {
        *last = simt::atomic_add(arrived, 1) == a.n_splits - 1;
        if (*last) *arrived = 0;
      }
      simt::sync();
      if (!*last) return false;  // all threads alike
      simt::fence();
      SIMT_NO_UNROLL
      for (int o = simt::thread_again(); o < S::kRows * D; o += S::kThreads) {
        const float* first = Partials::at(a, stream, 0);
        const size_t stride = size_t(pairs) * S::kPartialFloats;
        const Part exact = exact_part(0, o);
        const Part coded = combine(
            a.n_splits, [&](int i) { return Partials::maximum(first + i * stride, o); },
            [&](int i) { return Partials::weight(first + i * stride, o); },
            [&](int i) { return Partials::sum(first + i * stride, o); });
        normalize(a, 0, o, coded, exact);
      }
    }
    return true;
  }
};

}  // namespace thimble::cuda
