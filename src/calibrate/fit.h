// Fits a profile to statistics.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "calibrate/statistics.h"
#include "profile/profile.h"

namespace thimble {

struct FitOptions {
  std::string transform = "klt";  // or "vecinfer", "oscar"
  std::vector<double> bits = {4, 2, 1};
  bool uneven = true;  // spend a rate's bits where they help most (calibrate/allot.h); klt only
  /// The budget that each layer's bits come from, [n_layers]; empty: all layers share one. A rate is the average of
  /// every budget, so layers that a configuration leaves f16 take no bits from coded ones if they have another budget.
  std::vector<int> budgets;
  int iterations = 20;  // of k-means
  uint64_t seed = 1;
  int n_threads = 1;
};

/// One head's keys or values, fitted at all rates.
struct FittedHead {
  FittedTransform transform;
  struct Rate {
    Format format;
    std::vector<int16_t> order;  // as deal_components returns it
    Codebook codebook;
    double distortion;         // mean e^T S e of an error e, in the units of the metric S
    std::vector<float> error;  // of keys, as HeadCodec::error
    // The same by kind of text, on samples that were held out, and of the codec without calibration; empty with one
    // kind of text.
    std::vector<double> noise, built_in_noise;
  };
  std::vector<Rate> rates;    // one for each format, in their order
  std::vector<double> power;  // of the vectors themselves, by kind of text
  bool is_built_in = false;   // the codec without calibration, which serves some kind of text better
};

/// What came of the fit, by kind of text.
struct FitReport {
  struct Rate {
    double bits = 0;
    int budget = 0;
    std::vector<double> noise;  // [n_text_kinds], over that of the codec without calibration at the same rate
  };
  std::vector<Rate> rates;  // empty with one kind of text
  size_t n_heads = 0;       // keys and values of KV heads
  size_t n_built_in = 0;    // of them, those that have the codec without calibration
};

/// `samples` are [n][head_dim]; `metric` is that of fit_klt. Throws std::runtime_error where there are no samples.
FittedHead fit_head(const Matrix& samples, const Eigen::MatrixXd& metric, Kind kind, const std::vector<Format>& formats,
                    const FitOptions& options, uint64_t seed);

/// `value_metrics`: the metric of values for each layer and KV head; empty matrices stand for the identity. Heads are
/// fitted by n_threads threads, each from its own seed, so the result does not depend on their number. `progress` is
/// called with the share of heads done, by one thread at a time.
///
/// Where bits are spent unevenly, a side's cost is the power of the noise that its codes add to the layer's output,
/// times LayerStatistics::output_weight. With p the attention weights of a query over coded cells, e a value's error, o
/// the output, and the errors of cells independent of each other:
///   values:  |Wo sum p e|^2 = sum p^2 * E|Wo e|^2
///   keys:    a score's error s moves the output by p s Wo (v - o), so sum p^2 * E[s^2] * E|Wo (v - mean v)|^2
/// With several kinds of text these are measured for each kind, on samples that were held out, and rates are chosen for
/// the kind that fares worst (allot_for_worst). A head's keys or values whose codec makes more noise on some kind, by a
/// tenth at all rates together, than the one without calibration get that one.
Profile fit_profile(const ModelShape& shape, const std::vector<LayerStatistics>& layers,
                    const std::vector<std::vector<Eigen::MatrixXd>>& value_metrics, const FitOptions& options,
                    const std::function<void(double)>& progress, FitReport* report = nullptr);

}  // namespace thimble
