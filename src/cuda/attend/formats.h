// Decode attention: which formats there are kernels for, and the shared memory that a block of each takes. No CUDA in
// it, like deal.h.
#pragma once

#include "cuda/attend/shape.h"

namespace thimble::cuda {

/// What `f.template operator()<KeyWidth, ValueWidth>()` returns, for the pairs of widths that there are kernels for:
/// equal ones, and keys at twice the bits of values. `none` for others.
template <typename F, typename Result>
Result for_widths(int key_width, int value_width, const F& f, Result none) {
  switch (key_width * 10 + value_width) {
    case 22:
      return f.template operator()<2, 2>();
    case 24:
      return f.template operator()<2, 4>();
    case 44:
      return f.template operator()<4, 4>();
    case 48:
      return f.template operator()<4, 8>();
    case 88:
      return f.template operator()<8, 8>();
    default:
      return none;
  }
}

/// Bytes of shared memory for one item at a time, with Hopper's tables (`large`) or others'; 0 where there is no
/// kernel.
inline size_t attend_shared_bytes(bool large, int head_dim, int key_width, int value_width) {
  const auto of_size = [&]<int HeadDim>() {
    const auto of_widths = [&]<int KeyWidth, int ValueWidth>() {
      return large ? AttendShape<HeadDim, KeyWidth, ValueWidth, true>::kSharedBytes
                   : AttendShape<HeadDim, KeyWidth, ValueWidth, false>::kSharedBytes;
    };
    return for_widths(key_width, value_width, of_widths, size_t(0));
  };
  switch (head_dim) {
    case 64:
      return of_size.template operator()<64>();
    case 128:
      return of_size.template operator()<128>();
    case 256:
      return of_size.template operator()<256>();
    default:
      return 0;
  }
}

}  // namespace thimble::cuda
