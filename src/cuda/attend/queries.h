// Decode attention: fetching queries and codewords' scales to shared memory, and transforming the queries there.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cuda/attend/items.h"
#include "cuda/attend/matrix.h"
#include "cuda/attend/rows.h"
#include "cuda/attend/shared.h"
#include "cuda/encode/hadamard.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

template <typename S>
struct AttendQueries {
  using Items = AttendItems<S>;
  static constexpr int D = S::kHeadDim, MK = S::kKeySubspaces, MV = S::kValueSubspaces;
  using Matrix = RowsTimesMatrix<S>;
  using Shared = AttendShared<S>;

  SIMT static void copy_scales(const AttendArgs& a) {
    static_assert(MK <= S::kThreads && MV <= S::kThreads);
    const int head = simt::block_y(), m = simt::thread();
    if (m < MV)
      simt::copy_async<4>(simt::shared() + offsetof(Shared, value_scales) + m * 4, a.value_codec.scale + head * MV + m);
    if (m < MK)
      simt::copy_async<4>(simt::shared() + offsetof(Shared, key_scales) + m * 4, a.key_codec.scale + head * MK + m);
  }

  /// Starts copying a batch's queries to shared memory, as the model wrote them. The warp that will transform a row
  /// copies it.
  SIMT static void fetch(const AttendArgs& a, int batch) {
    if (batch >= Items::n_batches(a)) return;
    const int thread = simt::thread_again(), warp = thread / 32, lane = thread % 32, n_slots = Items::n_slots(a, batch);
    const int slot = warp / S::kRows;
    const auto row = Items::query_row(a, warp % S::kRows);
    const bool is_there = row.token < a.n_tokens;
    const float* from = a.queries + Items::stream_of(a, Items::first_item(a, batch) + slot) * a.query_stream_stride +
                        row.token * a.query_token_stride + row.head * a.query_head_stride + lane * 4;
    uint8_t* to = simt::shared() + offsetof(Shared, queries) + (warp * D + lane * 4) * 4;
    SIMT_UNROLL
    for (int k = 0; k < S::kWarpRows; k++) {
      if (slot + k * S::kSlotStep >= n_slots) break;
      SIMT_UNROLL
      for (int d = 0; d < D; d += 128) {
        if (lane * 4 + d >= D) continue;
        if (is_there) {
          simt::copy_async<16>(to + d * 4, from + d);
        } else {
          *reinterpret_cast<uint4*>(to + d * 4) = make_uint4(0, 0, 0, 0);
        }
      }
      from += S::kSlotStep * a.query_stream_stride;
      to += S::kSlotStep * S::kRows * D * 4;
    }
  }

  /// Transforms a batch's queries and calls put(slot, r, x, lane) for each row, in all lanes of a warp: lane i has the
  /// components x from i * N on, N being their number. `put` stores the row, scaled as it likes, in the place where the
  /// query was, and returns what one unit of the stored row stands for; Shared::factors then takes scores back to
  /// logits. The caller needs a barrier before it reads what `put` stored.
  ///
  /// Codes stand for a key less the codec's mean. The logits of coded cells therefore lack the query's product with the
  /// mean, which is the same for all cells, as is HeadCodec::score_bias: Shared::offsets has both. A softcap wants them
  /// in each cell's; else they are added to their maximum.
  template <typename Put>
  SIMT static void transform(const AttendArgs& a, int n_slots, Put put) {
    const int thread = simt::thread_again(), warp = thread / 32, lane = thread % 32, r = warp % S::kRows;
    if (a.key_codec.undo) {
      SIMT_NO_UNROLL
      for (int slot = 0; slot < n_slots; slot++) {
        const float* partial = Matrix::multiply(query_rows(slot, 0), a.key_codec.undo);
        if (warp < S::kRows) {
          float x[1][kLaneComponents] = {};
          SIMT_UNROLL
          for (int i = 0; i < kLaneComponents; i++) {
            SIMT_UNROLL
            for (int part = 0; part < Matrix::kParts; part++) {
              x[0][i] += partial[(part * S::kRows + r) * D + lane * kLaneComponents + i];
            }
          }
          put_rows(a, slot, r, lane, x, put);
        }
        if constexpr (S::kSlots > 1) simt::sync();
      }
    } else if (warp / S::kRows < n_slots) {
      float x[S::kWarpRows][kLaneComponents];
      SIMT_UNROLL
      for (int k = 0; k < S::kWarpRows; k++) {
        read_floats(query_rows(warp / S::kRows + k * S::kSlotStep, r) + lane * kLaneComponents, x[k]);
      }
      hadamard_warp<D>(x, lane);
      put_rows(a, warp / S::kRows, r, lane, x, put);
    }
  }

  /// Returns a row's greatest absolute component, in all lanes; NaN if any is NaN.
  template <int N>
  SIMT static float greatest_of(const float (&x)[N]) {
    float greatest = 0;
    SIMT_UNROLL
    for (int i = 0; i < N; i++) greatest = simt::max_nan(greatest, fabsf(x[i]));
    // Floats that are not negative have the order of their bits, with NaN as the greatest.
    return simt::bits_to_float(simt::max_of_warp(simt::float_to_bits(greatest)));
  }

  /// Transforms a batch's queries in their place and scales each to a greatest component of 1, so that score tables fit
  /// f16. Ends with a barrier.
  SIMT static void transform(const AttendArgs& a, int n_slots) {
    transform(a, n_slots, [&](int slot, int r, const float(&x)[D / 32], int lane) {
      float* query = simt::shared_at<float, offsetof(Shared, queries)>() + (slot * S::kRows + r) * D;
      const float greatest = greatest_of(x), inverse = greatest == 0 ? 0.0f : simt::reciprocal_fast(greatest);
      SIMT_UNROLL
      for (int i = 0; i < D / 32; i++) query[lane * (D / 32) + i] = x[i] * inverse;
      return greatest;
    });
    simt::sync();
  }

private:
  static constexpr int kLaneComponents = D / 32;

  SIMT static float* query_rows(int slot, int r) {
    return simt::shared_at<float, offsetof(Shared, queries)>() + (slot * S::kRows + r) * D;
  }

  /// Calls `put` for row r of every kSlotStep-th slot from `slot` on, and stores their factors and offsets.
  template <int Rows, typename Put>
  SIMT static void put_rows(const AttendArgs& a, int slot, int r, int lane, const float (&x)[Rows][kLaneComponents],
                            Put put) {
    float offset[Rows] = {};
    if (a.key_codec.error) {
      const float* error = a.key_codec.error + size_t(simt::block_y()) * D + lane * kLaneComponents;
      SIMT_UNROLL
      for (int k = 0; k < Rows; k++) {
        SIMT_UNROLL
        for (int i = 0; i < kLaneComponents; i++) {
          offset[k] += 0.5f * a.scale * x[k][i] * x[k][i] * simt::load_constant(error + i);
        }
      }
    }
    if (a.key_codec.mean) {
      const float* mean = a.key_codec.mean + size_t(simt::block_y()) * D;
      SIMT_UNROLL
      for (int k = 0; k < Rows; k++) {
        const float* query = query_rows(slot + k * S::kSlotStep, r);
        for (int d = lane; d < D; d += 32) offset[k] += query[d] * simt::load_constant(mean + d);
      }
    }
    if (a.key_codec.error || a.key_codec.mean) {
      SIMT_UNROLL
      for (int k = 0; k < Rows; k++) {
        SIMT_UNROLL
        for (int mask = 1; mask < 32; mask *= 2) offset[k] += simt::shuffle_xor(offset[k], mask);
      }
    }
    simt::sync_warp();
    SIMT_UNROLL
    for (int k = 0; k < Rows; k++) {
      const int at = slot + k * S::kSlotStep;  // slots from n_slots on have no item; nobody reads what is put there
      const float greatest = put(at, r, x[k], lane);
      if (lane != 0) continue;
      simt::shared_at<float, offsetof(Shared, factors)>()[at * S::kRows + r] = greatest * a.scale * kLog2e;
      simt::shared_at<float, offsetof(Shared, offsets)>()[at * S::kRows + r] = offset[k] * a.scale * kLog2e;
    }
  }
};

}  // namespace thimble::cuda
