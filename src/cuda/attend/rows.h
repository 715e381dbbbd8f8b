// Decode attention: loads and stores of several adjacent floats of a row.
#pragma once

#include "cuda/simt/simt.h"

namespace thimble::cuda {

/// log2 e. Logits are in units of it, so that exp2 gives weights.
inline constexpr float kLog2e = 1.44269504f;

/// Reads N adjacent floats, 2, 4 or 8; from L2 if other thread blocks wrote them.
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

}  // namespace thimble::cuda
