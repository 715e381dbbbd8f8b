#include "calibrate/rope.h"

#include <cmath>

namespace thimble {

Rope::Turn Rope::by(double positions) const {
  Turn turn;
  for (double frequency : frequencies) {
    turn.cosines.push_back(float(std::cos(positions * frequency)));
    turn.sines.push_back(float(std::sin(positions * frequency)));
  }
  return turn;
}

void Rope::apply(const Turn& turn, float* x) const {
  const size_t n_pairs = frequencies.size();
  for (size_t i = 0; i < n_pairs; i++) {
    float& a = x[neighbours ? 2 * i : i];
    float& b = x[neighbours ? 2 * i + 1 : i + n_pairs];
    const float c = turn.cosines[i], s = turn.sines[i];
    const float turned = a * c - b * s;
    b = a * s + b * c;
    a = turned;
  }
}

}  // namespace thimble
