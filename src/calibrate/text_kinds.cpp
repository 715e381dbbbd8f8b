#include "calibrate/text_kinds.h"

#include <cmath>

namespace thimble {
namespace {

constexpr size_t kSamplesOfKind = 128;

double mean_cost(const Matrix& errors, const Eigen::MatrixXd& metric) {
  if (errors.rows() == 0) return 0;
  const Eigen::MatrixXd e = errors.cast<double>();
  return (e * metric).cwiseProduct(e).sum() / double(errors.rows());
}

}  // namespace

double noise_of(const HeadCodec& codec, const Matrix& samples, const Eigen::MatrixXd& metric) {
  Matrix errors(samples.rows(), samples.cols());
  std::vector<float> y(samples.cols()), decoded(samples.cols());
  std::vector<uint8_t> codes(codec.format.n_subspaces());
  for (Eigen::Index i = 0; i < samples.rows(); i++) {
    codec.transform.forward(samples.row(i).data(), y.data());
    const uint16_t scale = encode_vector(codec, y.data(), codes.data());
    decode_vector(codec, codes.data(), scale, decoded.data());
    codec.transform.inverse(decoded.data(), errors.row(i).data());
    errors.row(i) -= samples.row(i);
  }
  return mean_cost(errors, metric);
}

HeldOut::HeldOut(const LayerStatistics& layer, Kind kind, int kv_head, const Eigen::MatrixXd& value_metric) {
  const int dim = layer.shape().dim(kind);
  for (int k = 0; k < layer.n_text_kinds(); k++) {
    OfKind of{layer.held_out(kind, kv_head, k, kSamplesOfKind), {}};
    if (kind == Kind::key) {
      of.metric = layer.query_moment(kv_head, k) * std::pow(double(layer.score_scale()), 2);
    } else {
      of.metric = value_metric.size() ? value_metric : Eigen::MatrixXd::Identity(dim, dim);
    }
    kinds.push_back(std::move(of));
  }
}

std::vector<double> HeldOut::noise(const HeadCodec& codec) const {
  std::vector<double> noise;
  for (const OfKind& of : kinds) noise.push_back(noise_of(codec, of.samples, of.metric));
  return noise;
}

std::vector<double> HeldOut::power(const Eigen::RowVectorXf& mean) const {
  std::vector<double> power;
  for (const OfKind& of : kinds) power.push_back(mean_cost(of.samples.rowwise() - mean, of.metric));
  return power;
}

}  // namespace thimble
