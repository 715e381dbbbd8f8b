#include "calibrate/fit.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <exception>
#include <iterator>
#include <map>
#include <mutex>
#include <numeric>
#include <set>
#include <stdexcept>
#include <thread>
#include <tuple>

#include "calibrate/allot.h"
#include "calibrate/kmeans.h"

namespace thimble {
namespace {

constexpr Eigen::Index kDistortionSamples = 512;
// The rates that a side may get where bits are spent unevenly.
constexpr double kCandidateRates[] = {1, 1.25, 1.5, 2, 3, 4};

/// Appends a subspace's codewords as int8, scaled so that the largest number is 127.
void append_codewords(const Centres& centres, Codebook& book) {
  float largest = 0;
  for (float v : centres.values) largest = std::max(largest, std::fabs(v));
  const float scale = largest > 0 ? largest / 127.0f : 1.0f;
  for (float v : centres.values) book.words.push_back(int8_t(std::lround(v / scale)));
  book.scale.push_back(scale);
}

Codebook train_codebook(const Matrix& normalized, const std::vector<int16_t>& order, const Format& format,
                        int iterations, uint64_t seed) {
  Codebook book;
  for (int m = 0; m < format.n_subspaces(); m++) {
    // 256 centres in 2 dimensions need fewer points than in 4 or 8.
    const size_t step = format.width(m) == 2 ? 4 : 1;
    Points points{format.width(m), size_t(normalized.rows()) / step, {}};
    points.values.resize(points.width * points.count);
    for (int j = 0; j < points.width; j++) {
      const int column = order[format.offset(m) + j];
      for (size_t i = 0; i < points.count; i++) points.values[j * points.count + i] = normalized(i * step, column);
    }
    append_codewords(kmeans(points, iterations, seed * 257 + m), book);
  }
  return book;
}

/// Mean e^T S e of the error that a codec makes on some of the samples.
double distortion_of(const FittedHead& head, const FittedHead::Rate& rate, const Matrix& samples,
                     const Eigen::MatrixXd& metric, Kind kind) {
  const Eigen::Index dim = samples.cols();
  HeadCodec codec;
  codec.kind = kind;
  codec.format = rate.format;
  codec.codebook = rate.codebook;
  std::vector<float> a(dim * dim);
  for (Eigen::Index i = 0; i < dim; i++) {
    for (Eigen::Index j = 0; j < dim; j++) a[i * dim + j] = head.transform.matrix(i, rate.order[j]);
  }
  codec.transform = Transform::dense({head.transform.mean.begin(), head.transform.mean.end()}, std::move(a));
  codec.derive_tables();
  const Eigen::Index n = std::min<Eigen::Index>(kDistortionSamples, samples.rows()), step = samples.rows() / n;
  Matrix error(n, dim);
  std::vector<float> y(dim), decoded(dim);
  std::vector<uint8_t> codes(codec.format.n_subspaces());
  for (Eigen::Index i = 0; i < n; i++) {
    codec.transform.forward(samples.row(i * step).data(), y.data());
    const uint16_t scale = encode_vector(codec, y.data(), codes.data());
    decode_vector(codec, codes.data(), scale, decoded.data());
    codec.transform.inverse(decoded.data(), error.row(i).data());
    error.row(i) -= samples.row(i * step);
  }
  return (error.cast<double>() * metric).cwiseProduct(error.cast<double>()).sum() / double(n);
}

LayerProfile assemble_transforms(const std::vector<FittedHead>& heads) {
  LayerProfile profile;
  for (const FittedHead& head : heads) {
    const auto& [mean, matrix] = std::tie(head.transform.mean, head.transform.matrix);
    profile.mean.insert(profile.mean.end(), mean.data(), mean.data() + mean.size());
    profile.matrix.insert(profile.matrix.end(), matrix.data(), matrix.data() + matrix.size());
  }
  return profile;
}

LayerCodebooks assemble_codebooks(const std::vector<FittedHead>& heads, int rate_index) {
  LayerCodebooks books;
  for (const FittedHead& head : heads) {
    const FittedHead::Rate& rate = head.rates[rate_index];
    books.format = rate.format;
    books.order.insert(books.order.end(), rate.order.begin(), rate.order.end());
    books.words.insert(books.words.end(), rate.codebook.words.begin(), rate.codebook.words.end());
    books.scale.insert(books.scale.end(), rate.codebook.scale.begin(), rate.codebook.scale.end());
  }
  return books;
}

/// Calls work(0) to work(n - 1), each once, on several threads. Throws an exception that one of them threw.
void for_each_in_threads(size_t n, int n_threads, const std::function<void(size_t)>& work,
                         const std::function<void(double)>& progress) {
  std::atomic<size_t> next = 0;
  std::mutex mutex;
  std::exception_ptr failure;
  size_t done = 0;
  const auto run = [&] {
    for (size_t i; (i = next++) < n;) {
      try {
        work(i);
      } catch (...) {
        const std::lock_guard lock(mutex);
        failure = std::current_exception();
        next = n;
        return;
      }
      const std::lock_guard lock(mutex);
      progress(double(++done) / double(n));
    }
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < n_threads; i++) threads.emplace_back(run);
  run();
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

FittedHead fit_head(const Matrix& samples, const Eigen::MatrixXd& metric, Kind kind, const std::vector<Format>& formats,
                    const FitOptions& options, uint64_t seed) {
  if (samples.rows() == 0) throw std::runtime_error("no samples to calibrate on: give a longer text");
  FittedHead head;
  head.transform = options.transform == "vecinfer" ? fit_vecinfer(samples, kind) : fit_klt(samples, metric);
  // Codewords describe vectors normalized to a root mean square of 1, as encode_vector normalizes them.
  Matrix y = (samples.rowwise() - head.transform.mean) * head.transform.matrix;
  const float dim = float(y.cols());
  for (Eigen::Index i = 0; i < y.rows(); i++) {
    const float rms = y.row(i).norm() / std::sqrt(dim);
    if (rms > 0) y.row(i) /= rms;
  }
  std::vector<double> variance;
  for (Eigen::Index d = 0; d < y.cols(); d++) variance.push_back(double(y.col(d).squaredNorm()) / double(y.rows()));
  for (const Format& format : formats) {
    FittedHead::Rate rate{format, {}, {}, 0};
    if (head.transform.ordered_by_variance) {
      rate.order = deal_components(variance, format);
    } else {
      for (int d = 0; d < format.head_dim; d++) rate.order.push_back(int16_t(d));
    }
    rate.codebook = train_codebook(y, rate.order, format, options.iterations, seed);
    rate.distortion = distortion_of(head, rate, samples, metric, kind);
    head.rates.push_back(std::move(rate));
  }
  return head;
}

Profile fit_profile(const ModelShape& shape, const std::vector<LayerStatistics>& layers,
                    const std::vector<std::vector<Eigen::MatrixXd>>& value_metrics, const FitOptions& options,
                    const std::function<void(double)>& progress) {
  const bool uneven = options.uneven && options.transform == "klt";
  std::set<double> rates(options.bits.begin(), options.bits.end());
  if (uneven) rates.insert(std::begin(kCandidateRates), std::end(kCandidateRates));
  const std::vector<double> candidates(rates.begin(), rates.end());

  // One job for each KV head of a side; results in fitted[layer][kind][kv_head].
  struct Job {
    int layer, kv_head;
    Kind kind;
  };
  std::vector<Job> jobs;
  std::vector<std::array<std::vector<FittedHead>, 2>> fitted(shape.layers.size());
  for (size_t i = 0; i < shape.layers.size(); i++) {
    for (Kind kind : {Kind::key, Kind::value}) {
      fitted[i][int(kind)].resize(shape.layers[i].n_kv_heads);
      for (int h = 0; h < shape.layers[i].n_kv_heads; h++) jobs.push_back({int(i), h, kind});
    }
  }
  const auto metric_of = [&](const Job& job) -> Eigen::MatrixXd {
    const LayerStatistics& layer = layers[job.layer];
    if (job.kind == Kind::key) return layer.query_moment(job.kv_head) * std::pow(layer.score_scale(), 2);
    const Eigen::MatrixXd& metric = value_metrics[job.layer][job.kv_head];
    const int dim = shape.layers[job.layer].value_dim;
    return metric.size() ? metric : Eigen::MatrixXd::Identity(dim, dim);
  };
  const auto fit = [&](const Job& job, uint64_t seed) {
    const Matrix samples = layers[job.layer].samples(job.kind, job.kv_head);
    std::vector<Format> formats;
    for (double bits : candidates) formats.push_back(make_format(int(samples.cols()), bits));
    fitted[job.layer][int(job.kind)][job.kv_head] = fit_head(samples, metric_of(job), job.kind, formats, options, seed);
  };
  for_each_in_threads(
      jobs.size(), options.n_threads, [&](size_t i) { fit(jobs[i], options.seed * 7919 + i); }, progress);

  // The costs of each side (fit.h has the formula), by budget.
  std::map<int, std::vector<SideCosts>> sides;
  const auto budget_of = [&](size_t layer) { return options.budgets.empty() ? 0 : options.budgets.at(layer); };
  for (size_t i = 0; i < shape.layers.size(); i++) {
    const LayerShape& layer = shape.layers[i];
    SideCosts costs[2];
    for (int h = 0; h < layer.n_kv_heads; h++) {
      const auto& [keys, values] = fitted[i];
      const double spread =
          std::accumulate(values[h].transform.variance.begin(), values[h].transform.variance.end(), 0.0) *
          values[h].transform.metric_scale;
      const double weight = layers[i].concentration(h) * layers[i].output_weight();
      for (int kind : {0, 1}) {
        costs[kind].numbers += layer.dim(Kind(kind));
        costs[kind].costs.resize(candidates.size(), 0.0);
        for (size_t r = 0; r < candidates.size(); r++) {
          costs[kind].costs[r] +=
              weight * (kind == 0 ? keys[h].rates[r].distortion * spread : values[h].rates[r].distortion);
        }
      }
    }
    if (layer.n_kv_heads == 0) continue;
    std::vector<SideCosts>& of_budget = sides[budget_of(i)];
    of_budget.insert(of_budget.end(), {costs[0], costs[1]});
  }

  Profile profile;
  profile.shape = shape;
  profile.transform = options.transform;
  profile.bits = options.bits;
  std::sort(profile.bits.rbegin(), profile.bits.rend());
  for (size_t i = 0; i < shape.layers.size(); i++) {
    profile.density.push_back(shape.layers[i].n_kv_heads ? layers[i].density() : 0.0f);
    profile.keys.push_back(assemble_transforms(fitted[i][0]));
    profile.values.push_back(assemble_transforms(fitted[i][1]));
  }
  for (double bits : profile.bits) {
    const int even = int(std::find(candidates.begin(), candidates.end(), bits) - candidates.begin());
    std::map<int, std::vector<int>> allotted;
    for (const auto& [budget, of_budget] : sides) {
      allotted[budget] = uneven ? allot(of_budget, candidates, bits) : std::vector<int>(of_budget.size(), even);
    }
    std::map<int, size_t> side;
    for (size_t i = 0; i < shape.layers.size(); i++) {
      if (shape.layers[i].n_kv_heads == 0) continue;
      for (int kind : {0, 1}) {
        LayerProfile& into = (kind == 0 ? profile.keys : profile.values)[i];
        const int budget = budget_of(i);
        into.by_bits[bits] = assemble_codebooks(fitted[i][kind], allotted[budget][side[budget]++]);
      }
    }
  }
  return profile;
}

}  // namespace thimble
