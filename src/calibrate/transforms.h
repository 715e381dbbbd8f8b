// The linear maps that make one head's keys or values easy to quantize, from samples of them.
#pragma once

#include <Eigen/Core>
#include <cstdint>
#include <vector>

#include "codec/format.h"

namespace thimble {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

struct FittedTransform {
  Eigen::RowVectorXf mean;          // [head_dim]
  Matrix matrix;                    // A of y = (x - mean) A, [head_dim][head_dim]
  std::vector<double> variance;     // [head_dim], of the components of y
  double metric_scale = 1;          // y is measured in the metric over this: |y|^2 * metric_scale = e^T S e
  bool ordered_by_variance = true;  // the components may be dealt out freely
};

/// Query-metric Karhunen-Loeve transform of `samples` [n][head_dim]. What a quantization error e costs is not |e|^2 but
/// e^T S e, where S is
///   keys:    E[q q^T] over the queries that meet them: the error of the score q.k, squared
///   values:  the sum of Wo^T Wo over the heads that read them: the error of the layer's output, squared
/// So vectors are mapped by S^(1/2), where the cost is the plain distance, and then turned to the principal axes of
/// their covariance there: y = (x - mean) S^(1/2) U.
FittedTransform fit_klt(const Matrix& samples, const Eigen::MatrixXd& metric);

/// VecInfer's (arXiv 2510.06175, section 3): keys are divided by lambda = sqrt(max |x|) of each channel, then rotated
/// by Hadamard's matrix; values are only rotated. No mean is taken off.
FittedTransform fit_vecinfer(const Matrix& samples, Kind kind);

/// How the components of y are dealt out to subspaces: component d of the coded vector is column order[d].
///
/// At 8 bits a subspace, the bits that a component deserves follow from its variance by reverse water-filling (Cover
/// and Thomas, Elements of Information Theory, 10.3.3). Components are dealt from the most varying on, each to the
/// subspace that has the fewest bits so far and room, so that all end with about the same; wide subspaces of a mixed
/// format then hold most of the components that hardly vary.
std::vector<int16_t> deal_components(const std::vector<double>& variance, const Format& format);

/// Bits for each component, max(0, log2(variance / level) / 2), the level chosen so that they sum to `total`.
std::vector<double> water_fill(const std::vector<double>& variance, double total);

}  // namespace thimble
