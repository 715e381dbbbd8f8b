// The codeword that a warp takes for a part of a vector: the one of greatest gain |y.c| - |c|^2 / 2, of equal ones the
// lowest (encode_vector). Each lane offers the codewords that it has, in ascending order; then the lanes compare.
#pragma once

#include "cuda/simt/simt.h"

namespace thimble::cuda {

struct NearestCode {
  float gain = 0;
  int code = -1;  // with its sign in bit 7; -1 before the first offer

  /// A codeword whose product with the vector's part is `dot`, and half of whose square is `half_norm`.
  SIMT void offer(int codeword, float dot, float half_norm) {
    const float its = simt::sub_rn(fabsf(dot), half_norm);
    if (code >= 0 && !(its > gain)) return;
    gain = its;
    code = codeword | (dot < 0 ? 0x80 : 0);
  }
  /// All lanes of a warp are to call this; then each has the nearest of all offers.
  SIMT void join_lanes() {
    SIMT_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) {
      const float other_gain = simt::shuffle_xor(gain, mask);
      const int other = simt::shuffle_xor(code, mask);
      if (other_gain > gain || (other_gain == gain && (other & 0x7f) < (code & 0x7f))) {
        gain = other_gain;
        code = other;
      }
    }
  }
};

}  // namespace thimble::cuda
