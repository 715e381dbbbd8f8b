// k-means whose 256 centres come in pairs c, -c, so that a code is 7 bits of index and a sign (codec/codebook.h).
// Libraries cluster points, not points up to sign, hence our own; it is Lloyd's algorithm with |x.c| in place of x.c
// and every point counted with the sign of x.c.
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

/// Index of the centre nearest to each point (the pair's, whatever the sign), into `nearest` [count]. The count must be
/// a multiple of 16.
void assign(const Points& points, const Centres& centres, uint8_t* nearest);

/// Deterministic for a seed. `iterations` on some thousand points, then a third as many on all (but at most 15 at the
/// end). Throws std::runtime_error for fewer than 16 points.
Centres kmeans(const Points& points, int iterations, uint64_t seed);

}  // namespace thimble
