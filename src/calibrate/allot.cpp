#include "calibrate/allot.h"

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

}  // namespace thimble
