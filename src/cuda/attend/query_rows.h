// Decode attention: what becomes of a query row's scores before they are weights, for coded cells and exact rows alike.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/attend/items.h"
#include "cuda/attend/rows.h"
#include "cuda/attend/shared.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

template <typename S>
struct QueryRows {
  using Items = AttendItems<S>;

  /// A lane's query row. Its factors lie in shared memory, as registers are scarce.
  struct Row {
    int t, slot;
    uint32_t mask;  // element of a.mask where the mask of its token begins

    /// Takes sums of table entries to logits in units of log2 e, when multiplied with them.
    SIMT float factor() const {
      return simt::shared_at<float, offsetof(AttendShared<S>, factors)>()[slot * S::kRows + t];
    }
    /// What the logits of all coded cells lack, before any softcap, in the same units.
    SIMT float offset() const {
      return simt::shared_at<float, offsetof(AttendShared<S>, offsets)>()[slot * S::kRows + t];
    }
    /// Factor on the mask, in the same units.
    SIMT float slope() const { return simt::shared_at<float, offsetof(AttendShared<S>, slopes)>()[t]; }
  };

  SIMT static Row make_row(const AttendArgs& a, int stream, int slot, int t) {
    // Rows that only pad the group follow the last token; nobody reads their results.
    const int token = Items::query_row(a, t).token;
    Row r;
    r.t = t;
    r.slot = slot;
    r.mask =
        uint32_t(stream * a.mask_stream_stride + (token < a.n_tokens ? token : a.n_tokens - 1) * a.mask_token_stride);
    return r;
  }

  SIMT static void store_slopes(const AttendArgs& a) {
    const int t = simt::thread();
    if (t >= S::kRows) return;
    simt::shared_at<float, offsetof(AttendShared<S>, slopes)>()[t] =
        a.slopes ? a.slopes[Items::query_row(a, t).head] * kLog2e : kLog2e;
  }

  SIMT static float capped(float x, float softcap) {  // softcap * tanh(x / softcap), both in units of log2 e
    return softcap * kLog2e * (1 - 2 * simt::reciprocal_fast(simt::exp2_fast(x * (2 / softcap)) + 1));
  }
};

}  // namespace thimble::cuda
