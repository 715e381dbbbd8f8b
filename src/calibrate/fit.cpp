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
#include "calibrate/text_kinds.h"
#include "codec/half.h"

namespace thimble {
namespace {

constexpr Eigen::Index kDistortionSamples = 512;
// With this much of the noise that the codec without calibration makes, a codec serves a kind of text badly. Samples
// tell less apart.
constexpr double kBadly = 1.1;
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

HeadCodec codec_of(const FittedHead& head, const FittedHead::Rate& rate, Kind kind) {
  const int dim = rate.format.head_dim;
  HeadCodec codec;
  codec.kind = kind;
  codec.format = rate.format;
  codec.codebook = rate.codebook;
  codec.error = rate.error;
  std::vector<float> a(size_t(dim) * dim);
  for (int i = 0; i < dim; i++) {
    for (int j = 0; j < dim; j++) a[size_t(i) * dim + j] = head.transform.matrix(i, rate.order[j]);
  }
  codec.transform = Transform::dense({head.transform.mean.begin(), head.transform.mean.end()}, std::move(a));
  codec.derive_tables();
  return codec;
}

/// Mean e^T S e of the error that a codec makes on some of the samples.
double distortion_of(const FittedHead& head, const FittedHead::Rate& rate, const Matrix& samples,
                     const Eigen::MatrixXd& metric, Kind kind) {
  const Eigen::Index n = std::min<Eigen::Index>(kDistortionSamples, samples.rows()), step = samples.rows() / n;
  Matrix some(n, samples.cols());
  for (Eigen::Index i = 0; i < n; i++) some.row(i) = samples.row(i * step);
  return noise_of(codec_of(head, rate, kind), some, metric);
}

/// The mean square of each coded component's error, over some of the samples.
std::vector<float> errors_of(const HeadCodec& codec, const Matrix& samples) {
  const Eigen::Index n = std::min<Eigen::Index>(kDistortionSamples, samples.rows()), step = samples.rows() / n;
  const int dim = codec.format.head_dim;
  std::vector<double> sums(dim, 0.0);
  std::vector<float> y(dim), decoded(dim);
  std::vector<uint8_t> codes(codec.format.n_subspaces());
  for (Eigen::Index i = 0; i < n; i++) {
    codec.transform.forward(samples.row(i * step).data(), y.data());
    const uint16_t scale = encode_vector(codec, y.data(), codes.data());
    decode_vector(codec, codes.data(), scale, decoded.data());
    for (int d = 0; d < dim; d++) sums[d] += std::pow(double(y[d] - decoded[d]), 2);
  }
  std::vector<float> errors;
  for (double sum : sums) errors.push_back(float(sum / double(n)));
  return errors;
}

/// Makes a head's codec the one without calibration, at all rates.
void fall_back(FittedHead& head, Kind kind, const std::vector<float>& stretch) {
  const int dim = int(head.transform.mean.size());
  const Transform transform = make_uncalibrated_codec(kind, head.rates.front().format, stretch).transform;
  head.transform.mean.setZero(dim);
  for (int i = 0; i < dim; i++) {
    const Eigen::RowVectorXf unit = Eigen::RowVectorXf::Unit(dim, i);
    transform.forward(unit.data(), head.transform.matrix.row(i).data());
  }
  for (float& x : head.transform.matrix.reshaped()) x = half_to_float(float_to_half(x));
  for (FittedHead::Rate& rate : head.rates) {
    std::iota(rate.order.begin(), rate.order.end(), int16_t{0});
    rate.codebook = builtin_codebook(rate.format);
    rate.noise = rate.built_in_noise;
  }
  head.is_built_in = true;
}

/// Measures a head by kind of text, and makes it the built-in codec where it serves some kind badly: where it makes
/// more noise at the rates `bits` together, which is nearly the noise at the lowest of them.
/// The kind of text that is left out does not count.
void measure_by_kind(FittedHead& head, const HeldOut& held_out, Kind kind, const std::vector<float>& stretch,
                     int left_out, const FitOptions& options) {
  head.power = held_out.power(head.transform.mean);
  std::vector<double> noise(head.power.size(), 0.0), built_in_noise = noise;
  for (FittedHead::Rate& rate : head.rates) {
    rate.noise = held_out.noise(codec_of(head, rate, kind));
    rate.built_in_noise = held_out.noise(make_uncalibrated_codec(kind, rate.format, stretch));
    const bool is_asked_for = std::any_of(options.bits.begin(), options.bits.end(), [&](double b) {
      return make_format(rate.format.head_dim, b) == rate.format;
    });
    for (size_t k = 0; is_asked_for && k < noise.size(); k++) {
      noise[k] += rate.noise[k];
      built_in_noise[k] += rate.built_in_noise[k];
    }
  }
  if (options.transform != "klt") return;  // as published
  bool serves_badly = false;
  for (size_t k = 0; k < noise.size(); k++) {
    serves_badly |= int(k) != left_out && noise[k] > kBadly * built_in_noise[k];
  }
  if (serves_badly) fall_back(head, kind, stretch);
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
    books.error.insert(books.error.end(), rate.error.begin(), rate.error.end());
  }
  return books;
}

/// What the keys and the values of a layer cost at each rate (fit.h has the formula), by `noise(head, kind, rate)`.
template <typename Noise>
std::array<SideCosts, 2> costs_by(const std::array<std::vector<FittedHead>, 2>& fitted, const LayerStatistics& layer,
                                  const Noise& noise) {
  std::array<SideCosts, 2> costs;
  for (int h = 0; h < layer.shape().n_kv_heads; h++) {
    const double weight = layer.concentration(h) * layer.output_weight();
    for (int kind : {0, 1}) {
      const std::vector<FittedHead::Rate>& rates = fitted[kind][h].rates;
      costs[kind].numbers += layer.shape().dim(Kind(kind));
      costs[kind].costs.resize(rates.size(), 0.0);
      for (size_t r = 0; r < rates.size(); r++) costs[kind].costs[r] += weight * noise(h, Kind(kind), rates[r]);
    }
  }
  return costs;
}

/// By the samples that were fitted to.
std::array<SideCosts, 2> costs_of(const std::array<std::vector<FittedHead>, 2>& fitted, const LayerStatistics& layer) {
  std::vector<double> spread;
  for (const FittedHead& head : fitted[int(Kind::value)]) {
    const std::vector<double>& variance = head.transform.variance;
    spread.push_back(std::accumulate(variance.begin(), variance.end(), 0.0) * head.transform.metric_scale);
  }
  return costs_by(fitted, layer, [&](int h, Kind kind, const FittedHead::Rate& rate) {
    return kind == Kind::key ? rate.distortion * spread[h] : rate.distortion;
  });
}

/// By the samples of a kind of text that were held out; of the codec that was fitted, or of the built-in one.
std::array<SideCosts, 2> costs_of(const std::array<std::vector<FittedHead>, 2>& fitted, const LayerStatistics& layer,
                                  int text_kind, bool built_in) {
  const std::vector<FittedHead>& values = fitted[int(Kind::value)];
  return costs_by(fitted, layer, [&](int h, Kind kind, const FittedHead::Rate& rate) {
    const double noise = (built_in ? rate.built_in_noise : rate.noise)[text_kind];
    return kind == Kind::key ? noise * values[h].power[text_kind] : noise;
  });
}

FitReport::Rate compare(double bits, int budget, const std::vector<std::vector<SideCosts>>& sides,
                        const std::vector<int>& chosen, const std::vector<std::vector<SideCosts>>& built_in,
                        const std::vector<int>& even) {
  FitReport::Rate rate{bits, budget, {}};
  for (size_t k = 0; k < sides.size(); k++) {
    rate.noise.push_back(total_cost(sides[k], chosen) / std::max(1e-300, total_cost(built_in[k], even)));
  }
  return rate;
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
  head.transform = options.transform == "vecinfer" ? fit_vecinfer(samples, kind)
                   : options.transform == "oscar"  ? fit_oscar(metric)
                                                   : fit_klt(samples, metric);
  // As a profile's file keeps it, so that codebooks are of the very transform that is used.
  for (float& x : head.transform.matrix.reshaped()) x = half_to_float(float_to_half(x));
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
    FittedHead::Rate rate{format, {}, {}, 0, {}, {}, {}};
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
                    const std::function<void(double)>& progress, FitReport* report) {
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
    if (options.transform == "oscar" && job.kind == Kind::value) {
      return oscar_value_target(layer.samples(Kind::key, job.kv_head), layer.samples(Kind::value, job.kv_head),
                                layer.query_moment(job.kv_head));
    }
    if (job.kind == Kind::key) return layer.query_moment(job.kv_head) * std::pow(layer.score_scale(), 2);
    const Eigen::MatrixXd& metric = value_metrics[job.layer][job.kv_head];
    const int dim = shape.layers[job.layer].value_dim;
    return metric.size() ? metric : Eigen::MatrixXd::Identity(dim, dim);
  };
  const bool several_kinds =
      std::any_of(layers.begin(), layers.end(), [](const auto& l) { return l.n_text_kinds() > 1; });
  const auto fit = [&](const Job& job, uint64_t seed) {
    const LayerStatistics& layer = layers[job.layer];
    const Matrix samples = layer.samples(job.kind, job.kv_head);
    std::vector<Format> formats;
    for (double bits : candidates) formats.push_back(make_format(int(samples.cols()), bits));
    FittedHead& head = fitted[job.layer][int(job.kind)][job.kv_head];
    head = fit_head(samples, metric_of(job), job.kind, formats, options, seed);
    if (several_kinds) {
      const HeldOut held_out(layer, job.kind, job.kv_head, value_metrics[job.layer][job.kv_head]);
      const std::vector<float> stretch = job.kind == Kind::key ? layer.key_stretch(job.kv_head) : std::vector<float>();
      measure_by_kind(head, held_out, job.kind, stretch, layer.left_out_kind(), options);
    }
    if (job.kind == Kind::value) return;
    for (FittedHead::Rate& rate : head.rates) rate.error = errors_of(codec_of(head, rate, job.kind), samples);
  };
  for_each_in_threads(
      jobs.size(), options.n_threads, [&](size_t i) { fit(jobs[i], options.seed * 7919 + i); }, progress);

  const auto budget_of = [&](size_t layer) { return options.budgets.empty() ? 0 : options.budgets.at(layer); };
  const int n_kinds = several_kinds ? layers[0].n_text_kinds() : 1;
  const int left_out = several_kinds ? layers[0].left_out_kind() : -1;
  std::map<int, std::vector<std::vector<SideCosts>>> sides, built_in;  // by budget, [n_kinds][n_sides]
  for (size_t i = 0; i < shape.layers.size(); i++) {
    if (shape.layers[i].n_kv_heads == 0) continue;
    for (int k = 0; k < n_kinds; k++) {
      for (auto* into : {&sides, &built_in}) {
        auto& of_budget = (*into)[budget_of(i)];
        of_budget.resize(n_kinds);
        const auto costs =
            several_kinds ? costs_of(fitted[i], layers[i], k, into == &built_in) : costs_of(fitted[i], layers[i]);
        of_budget[k].insert(of_budget[k].end(), costs.begin(), costs.end());
      }
    }
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
      const std::vector<int> evenly(of_budget[0].size(), even);
      std::vector<std::vector<SideCosts>> learned = of_budget;
      if (left_out >= 0) learned.erase(learned.begin() + left_out);
      allotted[budget] = uneven ? allot_for_worst(learned, candidates, bits) : evenly;
      // Sequences that end before any cell is coded show no attention to coded cells, and so no noise.
      const bool has_noise = total_cost(built_in[budget][0], evenly) > 0;
      if (report && several_kinds && has_noise) {
        report->rates.push_back(compare(bits, budget, of_budget, allotted[budget], built_in[budget], evenly));
      }
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
  if (report) {
    for (const auto& layer : fitted) {
      for (const auto& heads : layer) {
        report->n_heads += heads.size();
        report->n_built_in +=
            std::count_if(heads.begin(), heads.end(), [](const FittedHead& h) { return h.is_built_in; });
      }
    }
  }
  return profile;
}

}  // namespace thimble
