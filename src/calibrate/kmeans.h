// k-means whose 256 centres come in pairs c, -c, so that a code is 7 bits of index and a sign (codec/codebook.h).
// Libraries do not cluster points up to sign, so this is an implementation of our own: Lloyd's algorithm with |x.c| in
// place of x.c, where every point counts with the sign of x.c.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace thimble {

struct Points {
  int width = 0;
  size_t count = 0;
  std::vector<float> values;  // [width][count]

  const float* row(int component) const { return &values[component * count]; }
};

struct Centres {
  int width = 0;
  std::vector<float> values;  // [width][128]
};

/// Writes the index of the pair of centres that is nearest to each point to `nearest` [count]. The count must be a
/// multiple of 16.
void assign(const Points& points, const Centres& centres, uint8_t* nearest);

/// Deterministic for a seed. Runs `iterations` iterations on about 4096 of the points, then a third as many on all
/// points but the last `count` % 16. Throws std::runtime_error for fewer than 16 points.
Centres kmeans(const Points& points, int iterations, uint64_t seed);

}  // namespace thimble
