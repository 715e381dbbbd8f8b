// Rotary position embedding as ggml computes it, reduced to what calibration needs: turning a vector on by some number
// of positions. Rotations add up, so a key seen at position p, turned by r, is the key the model would have made at
// p + r from the same input: short texts yield the statistics of a long context.
#pragma once

#include <vector>

namespace thimble {

struct Rope {
  bool neighbours = false;          // pairs are (2i, 2i+1); else (i, i + n_pairs)
  std::vector<double> frequencies;  // radians a position, for each pair; empty: positions do not matter

  /// A turn by `positions`, which may be negative.
  struct Turn {
    std::vector<float> cosines, sines;  // for each pair
  };
  Turn by(double positions) const;

  /// Turns x [at least 2 * n_pairs] in place. Components beyond the pairs (partial RoPE) stay.
  void apply(const Turn& turn, float* x) const;
};

}  // namespace thimble
