#include "calibrate/fit.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "calibrate/kmeans.h"

namespace thimble {
namespace {

/// Codewords to int8, with the largest number of the subspace at 127.
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

}  // namespace

FittedHead fit_head(const Matrix& samples, const Eigen::MatrixXd& metric, Kind kind, const std::vector<Format>& formats,
                    const FitOptions& options, uint64_t seed) {
  if (samples.rows() == 0) throw std::runtime_error("no samples to calibrate on: give a longer text");
  FittedHead head;
  head.transform = options.transform == "vecinfer" ? fit_vecinfer(samples, kind) : fit_klt(samples, metric);
  // Codewords describe vectors normalized to a root mean square of 1, as encode_vector makes them.
  Matrix y = (samples.rowwise() - head.transform.mean) * head.transform.matrix;
  const float dim = float(y.cols());
  for (Eigen::Index i = 0; i < y.rows(); i++) {
    const float rms = y.row(i).norm() / std::sqrt(dim);
    if (rms > 0) y.row(i) /= rms;
  }
  std::vector<double> variance;
  for (Eigen::Index d = 0; d < y.cols(); d++) variance.push_back(double(y.col(d).squaredNorm()) / double(y.rows()));
  for (const Format& format : formats) {
    FittedHead::Rate rate{format, {}, {}};
    if (head.transform.ordered_by_variance) {
      rate.order = deal_components(variance, format);
    } else {
      for (int d = 0; d < format.head_dim; d++) rate.order.push_back(int16_t(d));
    }
    rate.codebook = train_codebook(y, rate.order, format, options.iterations, seed);
    head.rates.push_back(std::move(rate));
  }
  return head;
}

Profile fit_profile(const ModelShape& shape, const std::vector<LayerStatistics>& layers,
                    const std::vector<std::vector<Eigen::MatrixXd>>& value_metrics, const FitOptions& options,
                    const std::function<void(int, int)>& progress) {
  Profile profile;
  profile.shape = shape;
  profile.transform = options.transform;
  profile.bits = options.bits;
  std::sort(profile.bits.rbegin(), profile.bits.rend());
  profile.keys.resize(shape.layers.size());
  profile.values.resize(shape.layers.size());

  // Room for every head first, so that threads write to their own places.
  struct Job {
    int layer, kv_head;
    Kind kind;
  };
  std::vector<Job> jobs;
  for (size_t i = 0; i < shape.layers.size(); i++) {
    const LayerShape& layer = shape.layers[i];
    profile.density.push_back(layer.n_kv_heads ? layers[i].density() : 0.0f);
    for (Kind kind : {Kind::key, Kind::value}) {
      LayerProfile& into = (kind == Kind::key ? profile.keys : profile.values)[i];
      const size_t heads = layer.n_kv_heads, dim = layer.dim(kind);
      into.mean.resize(heads * dim);
      into.matrix.resize(heads * dim * dim);
      for (double bits : profile.bits) {
        if (heads == 0) continue;
        LayerCodebooks& books = into.by_bits[bits];
        books.format = make_format(int(dim), bits);
        books.order.resize(heads * dim);
        books.words.resize(heads * dim * kCodewords);
        books.scale.resize(heads * books.format.n_subspaces());
      }
      for (int h = 0; h < layer.n_kv_heads; h++) jobs.push_back({int(i), h, kind});
    }
  }

  const auto fit = [&](const Job& job, uint64_t seed) {
    LayerProfile& into = (job.kind == Kind::key ? profile.keys : profile.values)[job.layer];
    const size_t head = job.kv_head, dim = shape.layers[job.layer].dim(job.kind);
    std::vector<Format> formats;
    for (double bits : profile.bits) formats.push_back(into.by_bits.at(bits).format);
    Eigen::MatrixXd metric =
        job.kind == Kind::key ? layers[job.layer].query_moment(job.kv_head) : value_metrics[job.layer][head];
    if (metric.size() == 0) metric = Eigen::MatrixXd::Identity(dim, dim);
    const FittedHead fitted =
        fit_head(layers[job.layer].samples(job.kind, job.kv_head), metric, job.kind, formats, options, seed);
    std::copy_n(fitted.transform.mean.data(), dim, &into.mean[head * dim]);
    std::copy_n(fitted.transform.matrix.data(), dim * dim, &into.matrix[head * dim * dim]);
    for (size_t r = 0; r < profile.bits.size(); r++) {
      LayerCodebooks& books = into.by_bits.at(profile.bits[r]);
      const FittedHead::Rate& rate = fitted.rates[r];
      std::copy(rate.order.begin(), rate.order.end(), &books.order[head * dim]);
      std::copy(rate.codebook.words.begin(), rate.codebook.words.end(), &books.words[head * dim * kCodewords]);
      std::copy(rate.codebook.scale.begin(), rate.codebook.scale.end(),
                &books.scale[head * rate.codebook.scale.size()]);
    }
  };

  std::atomic<size_t> next = 0;
  std::mutex mutex;
  std::exception_ptr failure;
  int done = 0;
  const auto work = [&] {
    for (size_t i; (i = next++) < jobs.size();) {
      try {
        fit(jobs[i], options.seed * 7919 + i);
      } catch (...) {
        const std::lock_guard lock(mutex);
        failure = std::current_exception();
        next = jobs.size();
        return;
      }
      const std::lock_guard lock(mutex);
      progress(++done, int(jobs.size()));
    }
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < options.n_threads; i++) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
  return profile;
}

}  // namespace thimble
