#include "calibrate/rope.h"

#include <cmath>

namespace thimble {

void Rope::turn(float* x, double positions) const {
  const size_t n_pairs = frequencies.size();
  for (size_t i = 0; i < n_pairs; i++) {
    float& a = x[neighbours ? 2 * i : i];
    float& b = x[neighbours ? 2 * i + 1 : i + n_pairs];
    const double angle = positions * frequencies[i];
    const float c = float(std::cos(angle)), s = float(std::sin(angle));
    const float turned = a * c - b * s;
    b = a * s + b * c;
    a = turned;
  }
}

}  // namespace thimble
