// The noise that codes make on each kind of text, measured on samples that were held out from fitting. Noise is the
// mean of e^T S e over the errors e of coded vectors: S is E[q q^T], times the squared scale of scores, over the
// queries of that kind for keys; and Wo^T Wo for values, whatever the kind (calibrate/transforms.h).
#pragma once

#include <vector>

#include "calibrate/statistics.h"
#include "codec/head_codec.h"

namespace thimble {

/// Held-out samples of one head's keys or values, and their metrics, by kind of text.
struct HeldOut {
  struct OfKind {
    Matrix samples;          // [n][head_dim]
    Eigen::MatrixXd metric;  // [head_dim][head_dim]
  };
  std::vector<OfKind> kinds;  // [n_text_kinds]

  /// `value_metric`: as fit_profile takes it, empty for the identity.
  HeldOut(const LayerStatistics& layer, Kind kind, int kv_head, const Eigen::MatrixXd& value_metric);

  /// [n_text_kinds]
  std::vector<double> noise(const HeadCodec& codec) const;
  /// The noise of a codec that decodes every vector to `mean` [head_dim]: the vectors' own power.
  std::vector<double> power(const Eigen::RowVectorXf& mean) const;
};

/// Mean e^T S e of the errors that a codec makes on samples.
double noise_of(const HeadCodec& codec, const Matrix& samples, const Eigen::MatrixXd& metric);

}  // namespace thimble
