// Rotary position embedding (RoPE, arXiv 2104.09864) as ggml computes it, reduced to what calibration needs: to rotate
// a vector further by some number of positions. Rotations add up: a key of position p, rotated by r more positions, is
// the key that the model would have made at p + r from the same input. So short texts give the statistics of a long
// context.
#pragma once

#include <vector>

namespace thimble {

struct Rope {
  bool neighbours = false;          // pairs are (2i, 2i+1); else (i, i + n_pairs)
  std::vector<double> frequencies;  // radians a position, for each pair; empty: the model does not rotate its keys

  /// A rotation by `positions`, which may be negative.
  struct Turn {
    std::vector<float> cosines, sines;  // for each pair
  };
  Turn by(double positions) const;

  /// Rotates x [at least 2 * n_pairs] in place. Components beyond the pairs (partial RoPE) do not change.
  void apply(const Turn& turn, float* x) const;
};

}  // namespace thimble
