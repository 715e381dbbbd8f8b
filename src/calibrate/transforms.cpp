#include "calibrate/transforms.h"

#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

#include "codec/transform.h"

namespace thimble {
namespace {

// A metric in which some direction costs nothing has no inverse, so this share of the mean eigenvalue is added to all.
constexpr double kRidge = 1e-3;

}  // namespace

FittedTransform fit_klt(const Matrix& samples, const Eigen::MatrixXd& metric) {
  const Eigen::Index dim = samples.cols();
  FittedTransform fit;
  const Eigen::RowVectorXd mean = samples.cast<double>().colwise().mean();

  Eigen::MatrixXd s = metric;
  const double trace = s.trace();
  if (trace > 0) {
    s *= double(dim) / trace;
    fit.metric_scale = trace / double(dim);
  } else {
    s.setIdentity(dim, dim);
  }
  s.diagonal().array() += kRidge;
  const Eigen::MatrixXd root = Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd>(s).operatorSqrt();

  const Eigen::MatrixXd centred = samples.cast<double>().rowwise() - mean;
  const Eigen::MatrixXd covariance = root * (centred.transpose() * centred) * root / double(samples.rows());
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> axes(covariance);  // ascending

  fit.mean = mean.cast<float>();
  fit.matrix = (root * axes.eigenvectors().rowwise().reverse()).cast<float>();
  for (Eigen::Index i = dim; i-- > 0;) fit.variance.push_back(std::max(0.0, axes.eigenvalues()[i]));
  return fit;
}

FittedTransform fit_vecinfer(const Matrix& samples, Kind kind) {
  const int dim = int(samples.cols());
  FittedTransform fit;
  fit.ordered_by_variance = false;
  fit.mean = Eigen::RowVectorXf::Zero(dim);
  fit.matrix.resize(dim, dim);
  const Transform hadamard = Transform::hadamard(dim);
  for (int i = 0; i < dim; i++) {
    const float lambda = kind == Kind::key ? std::sqrt(std::max(samples.col(i).cwiseAbs().maxCoeff(), 1e-3f)) : 1.0f;
    const Eigen::RowVectorXf unit = Eigen::RowVectorXf::Unit(dim, i) / lambda;
    hadamard.forward(unit.data(), fit.matrix.row(i).data());
  }
  fit.variance.assign(dim, 1.0);
  return fit;
}

FittedTransform fit_oscar(const Eigen::MatrixXd& target) {
  const int dim = int(target.rows());
  if (dim < 1 || (dim & (dim - 1)) != 0) {
    throw std::invalid_argument("OSCAR rotates heads whose size is a power of two, not " + std::to_string(dim));
  }
  FittedTransform fit;
  fit.ordered_by_variance = false;
  fit.mean = Eigen::RowVectorXf::Zero(dim);
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> axes(target);  // ascending
  const Matrix vectors = axes.eigenvectors().cast<float>();
  Matrix mixed(dim, dim);
  const Transform hadamard = Transform::hadamard(dim);
  hadamard.forward(vectors.data(), mixed.data(), dim);
  fit.matrix.resize(dim, dim);
  for (int i = 0; i < dim; i++) {  // the i-th greatest eigenvalue's number goes where the bits of i say, reversed
    int reversed = 0;
    for (int bit = 1; bit < dim; bit *= 2) reversed = 2 * reversed + ((i & bit) != 0);
    fit.matrix.col(reversed) = mixed.col(dim - 1 - i);
  }
  fit.variance.assign(dim, 1.0);
  return fit;
}

Eigen::MatrixXd oscar_value_target(const Matrix& keys, const Matrix& values, const Eigen::MatrixXd& query_moment) {
  const Eigen::MatrixXd k = keys.cast<double>();
  const Eigen::VectorXd weights = (k * query_moment).cwiseProduct(k).rowwise().sum();
  const Eigen::MatrixXd v = values.cast<double>();
  return v.transpose() * weights.asDiagonal() * v / std::max(weights.sum(), 1e-12);
}

std::vector<double> water_fill(const std::vector<double>& variance, double total) {
  const auto bits_at = [&](double log_level) {
    std::vector<double> bits;
    for (double v : variance) bits.push_back(std::max(0.0, 0.5 * (std::log2(std::max(v, 1e-30)) - log_level)));
    return bits;
  };
  double low = -200, high = 200;
  for (int i = 0; i < 100; i++) {
    const double middle = (low + high) / 2;
    const auto bits = bits_at(middle);
    (std::accumulate(bits.begin(), bits.end(), 0.0) > total ? low : high) = middle;
  }
  return bits_at(high);
}

std::vector<int16_t> deal_components(const std::vector<double>& variance, const Format& format) {
  const std::vector<double> bits = water_fill(variance, 8.0 * format.n_subspaces());
  std::vector<int16_t> by_variance(variance.size());
  std::iota(by_variance.begin(), by_variance.end(), int16_t{0});
  std::stable_sort(by_variance.begin(), by_variance.end(), [&](int a, int b) { return variance[a] > variance[b]; });

  std::vector<std::vector<int16_t>> hands(format.n_subspaces());
  std::vector<double> loads(hands.size(), 0.0);
  for (int16_t component : by_variance) {
    int poorest = -1;
    for (int m = 0; m < format.n_subspaces(); m++) {
      if (int(hands[m].size()) < format.width(m) && (poorest < 0 || loads[m] < loads[poorest])) poorest = m;
    }
    hands[poorest].push_back(component);
    loads[poorest] += bits[component];
  }
  std::vector<int16_t> order;
  for (const auto& hand : hands) order.insert(order.end(), hand.begin(), hand.end());
  return order;
}

}  // namespace thimble
