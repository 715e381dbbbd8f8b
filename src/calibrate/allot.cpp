#include "calibrate/allot.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace thimble {

std::vector<int> allot(const std::vector<SideCosts>& sides, const std::vector<double>& rates, double target) {
  std::vector<int> chosen(sides.size(), 0);
  double left = 0;  // bits that a cell may still get, all sides together
  for (const SideCosts& side : sides) left += side.numbers * (target - rates[0]);
  for (;;) {
    double best_saving = 0;
    size_t best_side = 0;
    int best_rate = -1;
    for (size_t s = 0; s < sides.size(); s++) {
      for (int r = chosen[s] + 1; r < int(rates.size()); r++) {
        const double bits = sides[s].numbers * (rates[r] - rates[chosen[s]]);
        if (bits <= 0 || bits > left + 1e-9) continue;
        const double saving = (sides[s].costs[chosen[s]] - sides[s].costs[r]) / bits;
        if (saving > best_saving) best_saving = saving, best_side = s, best_rate = r;
      }
    }
    if (best_rate < 0) return chosen;
    left -= sides[best_side].numbers * (rates[best_rate] - rates[chosen[best_side]]);
    chosen[best_side] = best_rate;
  }
}

double total_cost(const std::vector<SideCosts>& sides, const std::vector<int>& chosen) {
  double total = 0;
  for (size_t s = 0; s < sides.size(); s++) total += sides[s].costs[chosen[s]];
  return total;
}

std::vector<int> allot_for_worst(const std::vector<std::vector<SideCosts>>& sides, const std::vector<double>& rates,
                                 double target) {
  constexpr int kRounds = 60;
  constexpr double kStep = 2.0;
  const size_t n_kinds = sides.size();
  if (n_kinds == 1) return allot(sides[0], rates, target);
  std::vector<double> own(n_kinds), weights(n_kinds, 1.0);
  for (size_t k = 0; k < n_kinds; k++) own[k] = std::max(1e-300, total_cost(sides[k], allot(sides[k], rates, target)));
  std::vector<int> best;
  double best_worst = INFINITY;
  for (int round = 0; round < kRounds; round++) {
    std::vector<SideCosts> mixed = sides[0];
    for (size_t s = 0; s < mixed.size(); s++) {
      for (size_t r = 0; r < rates.size(); r++) {
        mixed[s].costs[r] = 0;
        for (size_t k = 0; k < n_kinds; k++) mixed[s].costs[r] += weights[k] * sides[k][s].costs[r] / own[k];
      }
    }
    const std::vector<int> chosen = allot(mixed, rates, target);
    std::vector<double> ratios(n_kinds);
    for (size_t k = 0; k < n_kinds; k++) ratios[k] = total_cost(sides[k], chosen) / own[k];
    const double worst = *std::max_element(ratios.begin(), ratios.end());
    if (worst < best_worst) best_worst = worst, best = chosen;
    for (size_t k = 0; k < n_kinds; k++) weights[k] *= std::exp(kStep * (ratios[k] / worst - 1.0));
  }
  return best;
}

}  // namespace thimble
