// From statistics to a profile.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "calibrate/statistics.h"
#include "profile/profile.h"

namespace thimble {

struct FitOptions {
  std::string transform = "klt";  // or "vecinfer"
  std::vector<double> bits = {4, 2, 1};
  int iterations = 20;  // of k-means
  uint64_t seed = 1;
  int n_threads = 1;
};

/// One head's keys or values at all rates. `samples` are [n][head_dim]; `metric` as fit_klt takes it.
struct FittedHead {
  FittedTransform transform;
  struct Rate {
    Format format;
    std::vector<int16_t> order;
    Codebook codebook;
  };
  std::vector<Rate> rates;  // as the formats given
};
FittedHead fit_head(const Matrix& samples, const Eigen::MatrixXd& metric, Kind kind, const std::vector<Format>& formats,
                    const FitOptions& options, uint64_t seed);

/// `value_metrics`: the metric of values for each layer and KV head; empty matrices stand for the identity. Heads are
/// fitted by n_threads threads, each from its own seed, so the result does not depend on their number. `progress` is
/// called with heads done and heads in all, by one thread at a time.
Profile fit_profile(const ModelShape& shape, const std::vector<LayerStatistics>& layers,
                    const std::vector<std::vector<Eigen::MatrixXd>>& value_metrics, const FitOptions& options,
                    const std::function<void(int, int)>& progress);

}  // namespace thimble
