// Fits the linear maps that make one head's keys or values easy to quantize to samples of them.
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
  bool ordered_by_variance = true;  // deal_components may reorder the components
};

/// Karhunen-Loeve transform (KLT) of `samples` [n][head_dim] in the metric S, `metric` [head_dim][head_dim]. A
/// quantization error e costs not |e|^2 but e^T S e, where S is
///   keys:    E[q q^T] over the queries that attend to them, so that the cost is the squared error of the score q.k
///   values:  the sum of Wo^T Wo over the heads that read them: the squared error of the layer's output
/// So vectors are mapped by S^(1/2), after which the cost is the squared distance, and then rotated to the principal
/// axes U of their covariance: y = (x - mean) S^(1/2) U.
FittedTransform fit_klt(const Matrix& samples, const Eigen::MatrixXd& metric);

/// VecInfer's transform (arXiv 2510.06175, section 3): each channel of the keys is divided by lambda = sqrt(max |x|),
/// then keys are rotated by a Hadamard matrix; values are only rotated. No mean is subtracted.
FittedTransform fit_vecinfer(const Matrix& samples, Kind kind);

/// OSCAR's rotation (arXiv 2605.17757, and compute_kv_rotation.py of its authors): the principal axes of `target`, then
/// a Hadamard matrix, then an order of the components that spreads them over groups by bit reversal. The target is E[q
/// q^T] for keys, `oscar_value_target` for values. No mean is subtracted. Throws std::invalid_argument where the head
/// size is no power of two.
FittedTransform fit_oscar(const Eigen::MatrixXd& target);

/// The second moment of the values [n][value_dim], each token's weighted by k^T E[q q^T] k of its key [n][key_dim].
Eigen::MatrixXd oscar_value_target(const Matrix& keys, const Matrix& values, const Eigen::MatrixXd& query_moment);

/// Deals the components of y out to subspaces. Returns `order`: component d of the coded vector is column order[d].
///
/// A subspace has 8 bits. The bits that a component deserves follow from its variance by reverse water-filling (Cover
/// and Thomas, Elements of Information Theory, 10.3.3). Components are dealt in order of falling variance, each to the
/// subspace with room that has the fewest bits so far, so that all subspaces end with about the same; wide subspaces of
/// a mixed format then hold most of the components that hardly vary.
std::vector<int16_t> deal_components(const std::vector<double>& variance, const Format& format);

/// Bits for each component, max(0, log2(variance / level) / 2), with the level for which they sum to `total`.
std::vector<double> water_fill(const std::vector<double>& variance, double total);

}  // namespace thimble
