// Uneven bits at an even average: a side (the keys or the values of one layer) that costs more when it is coded
// coarsely gets more bits, at the expense of others.
#pragma once

#include <vector>

namespace thimble {

struct SideCosts {
  double numbers = 0;         // in one cell of the side
  std::vector<double> costs;  // expected harm at each candidate rate
};

/// The rate (its index) for each side, so that the average over all numbers is at most `target` bits and the sum of
/// costs about the smallest: from the lowest rate on, always the step that saves most for a bit (as Shoham and Gersho,
/// Efficient bit allocation for an arbitrary set of quantizers, 1988). `rates` ascend, the first is no more than the
/// target.
std::vector<int> allot(const std::vector<SideCosts>& sides, const std::vector<double>& rates, double target);

}  // namespace thimble
