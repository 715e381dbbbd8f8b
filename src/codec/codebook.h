// Sign-symmetric codebooks: every subspace has 128 codewords of int8 components and a float scale; a code's sign bit
// negates one, so that a subspace has 256 points. Codewords describe vectors normalized to a root mean square of 1.
#pragma once

#include <cstdint>
#include <vector>

#include "codec/format.h"

namespace thimble {

struct Codebook {
  /// [head_dim][128]: row d holds component d of all 128 codewords of the subspace that d lies in.
  std::vector<int8_t> words;
  /// [n_subspaces]: what the components of a subspace's codewords are multiplied by.
  std::vector<float> scale;

  int8_t word(int component, int index) const { return words[size_t(component) * kCodewords + index]; }
};

/// The codebook for uncalibrated use: k-means on Gaussian vectors, one table a width, the same in every subspace.
/// Made by tools/make_builtin_codebook.cpp.
Codebook builtin_codebook(const Format& format);

}  // namespace thimble
