// Decode attention: adds up the warps' results, then those of splits, and undoes the values' transform.
//
// Warps leave their results in shared memory. Where cells are split, thread blocks leave theirs in global memory, and
// the last one of them adds all splits up in their order, so that results do not depend on timing.
#pragma once

#include <cmath>
#include <cstddef>

#include "cuda/attend/exact.h"
#include "cuda/attend/items.h"
#include "cuda/attend/matrix.h"
#include "cuda/attend/parts.h"
#include "cuda/attend/rows.h"
#include "cuda/attend/shared.h"
#include "cuda/encode/hadamard.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

template <typename S>
struct AttendCombine {
  static constexpr int D = S::kHeadDim, N = D / 32;
  using Items = AttendItems<S>;
  using Matrix = RowsTimesMatrix<S>;
  using Shared = AttendShared<S>;
  using Exact = AttendExact<S>;
  using Warps = WarpParts<S>;
  using Partials = AttendPartials<S>;
  static constexpr size_t kCodedOutputs = Shared::coded_outputs(), kExactOutputs = Shared::exact_outputs();
  using Part = RowPart<N>;

  /// Where the output of query row r of an item goes; null if the row only pads its group.
  SIMT static float* target(const AttendArgs& a, int batch, int slot, int r) {
    const auto row = Items::query_row(a, r);
    if (row.token >= a.n_tokens) return nullptr;
    const int stream = Items::stream_of(a, Items::first_item(a, batch) + slot);
    return a.output + ((size_t(stream) * a.n_tokens + row.token) * a.n_kv_heads * a.group + row.head) * D;
  }

  /// Finishes row r of every kSlotStep-th slot from `slot` on, from the sums over coded cells, which are still
  /// transformed, and over exact rows. All lanes of a warp call it. It undoes Hadamard transforms and writes the
  /// output; with dense transforms it leaves the row in shared memory for write_output.
  template <int Rows>
  SIMT static void finish_rows(const AttendArgs& a, int batch, int slot, int r, int lane, const Part (&coded)[Rows],
                               const Part (&exact)[Rows]) {
    float x[Rows][N], c[Rows], e[Rows];
    SIMT_UNROLL
    for (int k = 0; k < Rows; k++) {
      const float maximum = fmaxf(coded[k].maximum, exact[k].maximum);
      c[k] = simt::exp2_fast(coded[k].maximum - maximum);
      e[k] = simt::exp2_fast(exact[k].maximum - maximum);
      float total = c[k] * coded[k].weight + e[k] * exact[k].weight;
      if (a.sinks) total += simt::exp2_fast(a.sinks[Items::query_row(a, r).head] * kLog2e - maximum);
      const float inverse = total == 0 ? 0.0f : simt::reciprocal_fast(total);
      c[k] *= inverse;
      e[k] *= inverse;
      SIMT_UNROLL
      for (int i = 0; i < N; i++) x[k][i] = coded[k].sum[i] * c[k];
    }
    if (!a.value_codec.undo) hadamard_warp<D>(x, lane);
    const int n_slots = Items::n_slots(a, batch);
    SIMT_UNROLL
    for (int k = 0; k < Rows; k++) {
      const int at = slot + k * S::kSlotStep, row = at * S::kRows + r;
      if (a.value_codec.undo) {
        float rest[N];
        SIMT_UNROLL
        for (int i = 0; i < N; i++) rest[i] = exact[k].sum[i] * e[k];
        write_floats(simt::shared_at<float, kCodedOutputs>() + row * D + lane * N, x[k]);
        write_floats(simt::shared_at<float, kExactOutputs>() + row * D + lane * N, rest);
        if (lane == 0) simt::shared_at<float, offsetof(Shared, coded_weights)>()[row] = c[k] * coded[k].weight;
      } else if (at < n_slots) {
        SIMT_UNROLL
        for (int i = 0; i < N; i++) x[k][i] += exact[k].sum[i] * e[k];
        if (float* out = target(a, batch, at, r)) write_floats(out + lane * N, x[k]);
      }
    }
  }

  SIMT static void finish_row(const AttendArgs& a, int batch, int slot, int r, int lane, const Part& coded,
                              const Part& exact) {
    const Part c[1] = {coded}, e[1] = {exact};
    finish_rows(a, batch, slot, r, lane, c, e);
  }

  /// Undoes dense transforms of values and writes a batch's outputs. Call it after a barrier.
  SIMT static void write_output(const AttendArgs& a, int batch) {
    if (!a.value_codec.undo) return;
    const int n_slots = Items::n_slots(a, batch);
    const float* coded = simt::shared_at<float, kCodedOutputs>();
    const float* weights = simt::shared_at<float, offsetof(Shared, coded_weights)>();
    const float* exact = simt::shared_at<float, kExactOutputs>();
    const float* mean = a.value_codec.mean + simt::block_y() * D;
    SIMT_NO_UNROLL
    for (int slot = 0; slot < n_slots; slot++) {
      const float* partial = Matrix::multiply(coded + slot * S::kRows * D, a.value_codec.undo);
      SIMT_NO_UNROLL
      for (int o = simt::thread_again(); o < S::kRows * D; o += S::kThreads) {
        const int r = o / D;
        float* out = target(a, batch, slot, r);
        if (!out) continue;
        float total = exact[slot * S::kRows * D + o] + weights[slot * S::kRows + r] * mean[o % D];
        SIMT_UNROLL
        for (int i = 0; i < Matrix::kParts; i++) total += partial[i * S::kRows * D + o];
        out[o % D] = total;
      }
      simt::sync();  // the next product or table takes this place
    }
  }

  /// Adds up the warps' results of each item, which leave(warp, lane) puts in the place of WarpParts for each warp:
  /// call it when the keys' table is used up, after a barrier. Then it finishes the rows, or leaves a partial result
  /// for the last thread block of the stream. Returns whether this thread block finished the rows; write_output may
  /// follow after a barrier.
  template <typename Leave>
  SIMT static bool finish_batch(const AttendArgs& a, int batch, Leave leave) {
    const int thread = simt::thread_again(), warp = thread / 32, lane = thread % 32;
    leave(warp, lane);
    simt::sync();
    const int item = Items::first_item(a, batch), stream = Items::stream_of(a, item),
              split = item - stream * a.n_splits;
    const int n_warps = Items::n_warps(a), n_slots = Items::n_slots(a, batch);
    const auto exact_part = [&](int slot, int r) {
      return Exact::any(a) ? Partials::part(Partials::at(a, stream + slot, a.n_splits), r, lane) : Part();
    };
    const int slot = warp / S::kRows, r = warp % S::kRows;
    if constexpr (S::kDirect) {  // never split
      if (slot < n_slots) {
        Part parts[S::kWarpRows], exact[S::kWarpRows];
        int first_warps[S::kWarpRows];
        SIMT_UNROLL
        for (int k = 0; k < S::kWarpRows; k++) {  // slots without an item take the last item's results
          const int at = slot + k * S::kSlotStep < n_slots ? slot + k * S::kSlotStep : n_slots - 1;
          first_warps[k] = at * n_warps;
          exact[k] = exact_part(at, r);
        }
        Warps::add_up_few(first_warps, n_warps, r, lane, parts);
        finish_rows(a, batch, slot, r, lane, parts, exact);
      }
      return true;
    }
    if (slot < n_slots) {
      const Part part = Warps::add_up(slot * n_warps, n_warps, r, lane);
      if (a.n_splits == 1) {
        finish_row(a, batch, slot, r, lane, part, exact_part(slot, r));
      } else {
        Partials::leave(Partials::at(a, stream, split), r, lane, part);
      }
    }
    if (a.n_splits == 1) return true;

    int* last = simt::shared_at<int, offsetof(Shared, is_last)>();
    const int pairs = a.n_kv_heads * a.row_groups;  // of KV head and row group
    simt::sync();
    int* arrived = a.arrived + size_t(stream) * pairs + Items::pair(a);
    if (thread == 0) {
      *last = simt::atomic_add_ordered(arrived, 1) == a.n_splits - 1;
      if (*last) *arrived = 0;
    }
    simt::sync();
    if (!*last) return false;  // all threads alike
    // Four warps, or two, share the splits of a row.
    constexpr int kShares = S::kWarps / S::kRows;
    const int share = warp / S::kRows;
    const size_t stride = size_t(pairs) * S::kPartialFloats;
    const float* first = Partials::at(a, stream, 0) + share * stride;
    const auto at = [&](int i) { return first + i * kShares * stride; };
    const Part mine =
        combine<N>((a.n_splits - share + kShares - 1) / kShares, [&](int i) { return Partials::maximum(at(i), r); },
                   [&](int i) { return Partials::weight(at(i), r); },
                   [&](int i, float(&to)[N]) { Partials::sums(at(i), r, lane, to); });
    write_floats(Warps::sums(share, r) + lane * N, mine.sum);
    if (lane == 0) Warps::leave_state(share, r, mine.maximum, mine.weight);
    simt::sync();
    if (warp < S::kRows)
      finish_row(a, batch, 0, warp, lane, Warps::add_up(0, kShares, warp, lane), exact_part(0, warp));
    return true;
  }
};

}  // namespace thimble::cuda
