// Random numbers that are the same in every run.
#pragma once

#include <cstddef>
#include <random>
#include <vector>

namespace thimble {

/// n numbers of mean 0 and deviation 1.
inline std::vector<float> gaussian(size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = normal(random);
  return x;
}

}  // namespace thimble
