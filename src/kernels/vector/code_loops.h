// The part of attention from codes that is the same in every instruction set: which of a unit's templates to call. A
// unit includes this header and then defines look_up_rows.
#pragma once

#include "kernels/vector/math.h"

namespace thimble {
namespace {

template <int Rows, bool Wide>
void look_up_rows(const uint8_t* luts, const float* steps, int n_subspaces, bool of_values,
                  const uint8_t* const* blocks, int n_blocks, const Prefetch& prefetch, float* scores, size_t stride);

void look_up(const uint8_t* luts, const float* steps, int n_rows, int n_subspaces, bool wide, bool of_values,
             const uint8_t* const* blocks, int n_blocks, const Prefetch& prefetch, float* scores, size_t stride) {
  using LookUp =
      void (*)(const uint8_t*, const float*, int, bool, const uint8_t* const*, int, const Prefetch&, float*, size_t);
  static constexpr LookUp kLookUp[2][kRowsAtOnce] = {
      {look_up_rows<1, false>, look_up_rows<2, false>, look_up_rows<3, false>, look_up_rows<4, false>},
      {look_up_rows<1, true>, look_up_rows<2, true>, look_up_rows<3, true>, look_up_rows<4, true>}};
  kLookUp[wide][n_rows - 1](luts, steps, n_subspaces, of_values, blocks, n_blocks, prefetch, scores, stride);
}

}  // namespace
}  // namespace thimble
