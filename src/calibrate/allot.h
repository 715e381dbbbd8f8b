// Uneven bits at a given average: a side (the keys or the values of one layer) that costs more when it is coded
// coarsely gets more bits, and others get fewer.
#pragma once

#include <vector>

namespace thimble {

struct SideCosts {
  double numbers = 0;         // in one cell of the side
  std::vector<double> costs;  // expected noise at each candidate rate (fit_profile says in which units)
};

/// Returns the index of a rate for each side, such that the average over all numbers is at most `target` bits and the
/// sum of costs is nearly the smallest. All sides begin at the lowest rate; each step raises the side whose cost falls
/// most for each bit (after Shoham and Gersho, Efficient bit allocation for an arbitrary set of quantizers, 1988).
/// `rates` ascend; the first must not be above the target.
std::vector<int> allot(const std::vector<SideCosts>& sides, const std::vector<double>& rates, double target);

/// The same for several kinds of text, `sides[kind]` with the costs that a kind has, for the kind that fares worst: so
/// that the greatest of a kind's sum of costs over the sum that it would have from an allotment of its own is nearly
/// the smallest. The kinds are weighted, and the weight of those that fare badly grows (multiplicative weights: Freund
/// and Schapire, Adaptive game playing using multiplicative weights, 1999).
std::vector<int> allot_for_worst(const std::vector<std::vector<SideCosts>>& sides, const std::vector<double>& rates,
                                 double target);

/// The sum of costs of the chosen rates.
double total_cost(const std::vector<SideCosts>& sides, const std::vector<int>& chosen);

}  // namespace thimble
