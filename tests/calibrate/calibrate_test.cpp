// Calibration: k-means up to sign, transforms, RoPE's rotations, allotment; and attention from coded keys, for
// synthetic keys with outliers that a plain Hadamard rotation codes badly.
#include <gtest/gtest.h>

#include <Eigen/QR>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <tuple>

#include "calibrate/allot.h"
#include "calibrate/collector.h"
#include "calibrate/fit.h"
#include "calibrate/kmeans.h"
#include "calibrate/rope.h"
#include "codec/head_codec.h"

namespace thimble {
namespace {

Matrix gaussian(int rows, int columns, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Matrix m(rows, columns);
  for (Eigen::Index i = 0; i < m.size(); i++) m.data()[i] = normal(random);
  return m;
}

TEST(Kmeans, FindsClustersUpToSign) {
  // 100 directions, each point a little off one of them or its opposite.
  const Matrix directions = gaussian(100, 4, 1), noise = gaussian(3200, 4, 2);
  Points points{4, 3200, std::vector<float>(4 * 3200)};
  for (int i = 0; i < 3200; i++) {
    for (int j = 0; j < 4; j++) {
      points.values[j * 3200 + i] = (i % 3 ? 1.0f : -1.0f) * directions(i % 100, j) + 0.01f * noise(i, j);
    }
  }
  const Centres centres = kmeans(points, 30, 1);
  std::vector<uint8_t> nearest(3200);
  assign(points, centres, nearest.data());
  double error = 0;
  for (int i = 0; i < 3200; i++) {
    double plus = 0, minus = 0;
    for (int j = 0; j < 4; j++) {
      const double x = points.row(j)[i], c = centres.values[size_t(j) * kCodewords + nearest[i]];
      plus += (x - c) * (x - c);
      minus += (x + c) * (x + c);
    }
    error += std::min(plus, minus) / 3200;
  }
  EXPECT_LT(error, 0.12);  // of 4; chance starts leave a few directions sharing a centre
}

TEST(Kmeans, AssignsTheNearest) {
  Points points{2, 64, {}};
  const Matrix x = gaussian(2, 64, 3), c = gaussian(2, kCodewords, 4);
  points.values.assign(x.data(), x.data() + x.size());
  const Centres centres{2, {c.data(), c.data() + c.size()}};
  std::vector<uint8_t> nearest(64);
  assign(points, centres, nearest.data());
  const auto distance = [&](int i, int k) {
    const Eigen::Vector2f p = x.col(i), q = c.col(k);
    return std::min((p - q).squaredNorm(), (p + q).squaredNorm());
  };
  for (int i = 0; i < 64; i++) {
    for (int k = 0; k < kCodewords; k++) EXPECT_LE(distance(i, nearest[i]), distance(i, k) + 1e-5);
  }
}

TEST(Kmeans, SameSeedSameCentres) {
  const Matrix x = gaussian(4, 640, 5);
  const Points points{4, 640, {x.data(), x.data() + x.size()}};
  EXPECT_EQ(kmeans(points, 5, 1).values, kmeans(points, 5, 1).values);
  EXPECT_NE(kmeans(points, 5, 1).values, kmeans(points, 5, 2).values);
  EXPECT_THROW(kmeans({4, 0, {}}, 5, 1), std::runtime_error);
}

TEST(Rope, TurnsAddUpAndKeepScores) {
  for (bool neighbours : {false, true}) {
    Rope rope{neighbours, {1.0, 0.1, 0.01}};  // partial: 6 of 8 components
    const Matrix start = gaussian(2, 8, 6);
    Matrix once = start, twice = start;
    for (int i = 0; i < 2; i++) {
      rope.apply(rope.by(1000.5), once.row(i).data());
      rope.apply(rope.by(1500.5), twice.row(i).data());
      rope.apply(rope.by(-500.0), twice.row(i).data());
    }
    EXPECT_LT((once - twice).norm(), 1e-5);
    EXPECT_NEAR(once.row(0).dot(once.row(1)), start.row(0).dot(start.row(1)), 1e-4);
    EXPECT_GT((once - start).norm(), 0.1);
    EXPECT_EQ(once(0, 6), start(0, 6));
    EXPECT_EQ(once(1, 7), start(1, 7));
  }
}

TEST(Transforms, KltDecorrelatesInTheMetric) {
  const Matrix mixing = gaussian(16, 16, 7), samples = gaussian(4000, 16, 8) * mixing;
  const Matrix queries = gaussian(500, 16, 9) * gaussian(16, 16, 10);
  const Eigen::MatrixXd metric = (queries.transpose() * queries).cast<double>() / 500;
  const FittedTransform fit = fit_klt(samples, metric);
  const Eigen::MatrixXd y = ((samples.rowwise() - fit.mean) * fit.matrix).cast<double>();
  const Eigen::MatrixXd covariance = y.transpose() * y / double(y.rows());
  for (int i = 0; i < 16; i++) {
    EXPECT_NEAR(covariance(i, i) / fit.variance[i], 1, 1e-2);
    if (i > 0) {
      EXPECT_LE(fit.variance[i], fit.variance[i - 1]);
    }
    for (int j = 0; j < i; j++)
      EXPECT_LT(std::fabs(covariance(i, j)), 1e-2 * std::sqrt(fit.variance[i] * fit.variance[j]));
  }
  // Distance in y is the cost e^T S e, but for the ridge.
  const Eigen::RowVectorXf e = gaussian(1, 16, 11);
  const double cost = (e.cast<double>() * metric * e.cast<double>().transpose())(0, 0);
  EXPECT_NEAR((e * fit.matrix).squaredNorm() * fit.metric_scale / cost, 1, 0.02);
}

TEST(Transforms, OscarRotatesSoThatAllComponentsCostAlike) {
  const Matrix queries = gaussian(500, 16, 9) * gaussian(16, 16, 10);
  const Eigen::MatrixXd target = (queries.transpose() * queries).cast<double>() / 500;
  const FittedTransform fit = fit_oscar(target);
  EXPECT_LT((fit.matrix * fit.matrix.transpose() - Matrix::Identity(16, 16)).norm(), 1e-5);
  EXPECT_EQ(fit.mean.norm(), 0);
  const Eigen::MatrixXd rotated = fit.matrix.cast<double>().transpose() * target * fit.matrix.cast<double>();
  for (int i = 0; i < 16; i++) EXPECT_NEAR(rotated(i, i), target.trace() / 16, 1e-4 * target.trace());
  // Components are columns of the Hadamard matrix over the axes, ordered by falling eigenvalue: the greatest axis's
  // column 15 first, and bit reversal puts it at 0, the next (14) at 8, then 13 at 4.
  Eigen::MatrixXd diagonal = Eigen::MatrixXd::Zero(16, 16);
  for (int i = 0; i < 16; i++) diagonal(i, i) = 1 + i;  // axes ascend as they are
  const Transform hadamard = Transform::hadamard(16);
  const Matrix order = fit_oscar(diagonal).matrix;
  for (const auto [at, column] : {std::pair(0, 15), {8, 14}, {4, 13}, {15, 0}}) {
    for (int i = 0; i < 16; i++) {
      std::vector<float> unit(16, 0.0f), mixed(16);
      unit[i] = 1;
      hadamard.forward(unit.data(), mixed.data());
      EXPECT_NEAR(std::fabs(order(i, at)), std::fabs(mixed[column]), 1e-6);
      EXPECT_NEAR(order(i, at) * order(i, 0), mixed[column] * mixed[15], 1e-6);  // whatever an axis's sign is
    }
  }
  EXPECT_THROW(fit_oscar(Eigen::MatrixXd::Identity(24, 24)), std::invalid_argument);
}

TEST(Transforms, OscarWeighsValuesByTheirKeysScores) {
  Matrix keys(2, 2), values(2, 2);
  keys << 1, 0, 0, 2;
  values << 1, 1, 3, 0;
  Eigen::MatrixXd queries(2, 2);
  queries << 4, 0, 0, 1;  // scores 4 and 4
  EXPECT_TRUE(
      oscar_value_target(keys, values, queries).isApprox((Eigen::MatrixXd(2, 2) << 5, 0.5, 0.5, 0.5).finished()));
  queries(1, 1) = 0;  // the second token's weighs nothing
  EXPECT_TRUE(oscar_value_target(keys, values, queries).isApprox(Eigen::MatrixXd::Ones(2, 2)));
}

TEST(Transforms, DealsEveryComponentOnce) {
  std::vector<double> variance;
  for (int i = 0; i < 64; i++) variance.push_back(std::pow(0.8, i));
  for (double bits : {4.0, 3.0, 2.0, 1.5, 1.25, 1.0}) {
    const Format format = make_format(64, bits);
    const auto order = deal_components(variance, format);
    EXPECT_EQ(std::set<int>(order.begin(), order.end()).size(), 64u) << bits;
  }
}

TEST(Transforms, WaterFillsToTheTotal) {
  const auto bits = water_fill({100, 10, 1, 0.001}, 6);
  EXPECT_NEAR(bits[0] + bits[1] + bits[2] + bits[3], 6, 1e-6);
  EXPECT_NEAR(bits[0] - bits[1], 0.5 * std::log2(10), 1e-6);
  EXPECT_EQ(bits[3], 0);
}

TEST(Allot, SpendsWhereItSavesMostAndNoMore) {
  const std::vector<double> rates = {1, 2, 4};
  const std::vector<SideCosts> sides = {{64, {100, 25, 2}}, {64, {1, 0.25, 0.02}}, {64, {1, 0.25, 0.02}}};
  const auto chosen = allot(sides, rates, 2);
  EXPECT_EQ(chosen, (std::vector<int>{2, 0, 0}));
  EXPECT_EQ(allot(sides, rates, 1), (std::vector<int>{0, 0, 0}));
  EXPECT_EQ(allot(sides, rates, 4), (std::vector<int>{2, 2, 2}));
}

TEST(Allot, ServesTheKindThatFaresWorst) {
  // Two sides; the first kind gains by bits for one, the second, a hundredth as loud, by bits for the other. Bits for
  // both in turn would serve neither best.
  const std::vector<double> rates = {1, 2, 3};
  const std::vector<std::vector<SideCosts>> kinds = {{{64, {100, 25, 6}}, {64, {10, 2.5, 0.6}}},
                                                     {{64, {0.1, 0.025, 0.006}}, {64, {1, 0.25, 0.06}}}};
  std::vector<SideCosts> mean = kinds[0];
  for (size_t s = 0; s < 2; s++) {
    for (size_t r = 0; r < 3; r++) mean[s].costs[r] += kinds[1][s].costs[r];
  }
  EXPECT_EQ(allot(mean, rates, 2), (std::vector<int>{2, 0}));  // the second kind: 1.006, where its own choice has 0.16
  EXPECT_EQ(allot_for_worst(kinds, rates, 2), (std::vector<int>{1, 1}));
  EXPECT_EQ(allot_for_worst({kinds[1]}, rates, 2), allot(kinds[1], rates, 2));
  EXPECT_DOUBLE_EQ(total_cost(kinds[1], {1, 1}), 0.275);
}

// --- collecting, batch by batch ---

constexpr LayerShape kShape = {2, 4, 16, 16};

/// Keys, values and queries of a text, and the statistics of some way to read it.
class Reading {
public:
  Reading() : keys_(gaussian(kTokens, 32, 1)), values_(gaussian(kTokens, 32, 2)), queries_(gaussian(kTokens, 64, 3)) {
    for (int h = 0; h < 2; h++) {
      for (int i = 0; i < kTokens; i++) by_head_.insert(by_head_.end(), &keys_(i, h * 16), &keys_(i, h * 16) + 16);
    }
    options_.n_tokens = 10000;
    collector_ = std::make_unique<Collector>(options_);
  }

  /// A batch of runs whose tokens are the text's from `first` on. Their cells are the positions.
  void batch(std::vector<Run> runs, int first) {
    collector_->begin(std::move(runs));
    LayerBatch batch;
    batch.shape = kShape;
    batch.score_scale = 0.25f;
    batch.keys = keys_.row(first).data();
    batch.values = values_.row(first).data();
    batch.queries = queries_.row(first).data();
    collector_->add(0, batch);
    std::vector<double> squares;
    for (const Run& run : collector_->runs()) {
      for (int t = 0; t < run.n_tokens; t++) squares.push_back(first + run.first_token + t);
    }
    for (size_t i = 0; i < collector_->runs().size(); i++) {
      const Run& run = collector_->runs()[i];
      if (!Collector::may_end(run)) continue;
      CachedKeys cached{by_head_.data(), kTokens, [&](int token) {
                          std::vector<int> cells(size_t(run.first_position + token - run.first_token) + 1);
                          std::iota(cells.begin(), cells.end(), 0);
                          return cells;
                        }};
      collector_->add_attention(0, i, queries_.row(first).data(), cached);
    }
    collector_->add_power(0, Collector::Power::residual, squares, int(squares.size()));
  }
  LayerStatistics end() {
    collector_->end();
    return std::move(collector_->take_layers(1)[0]);
  }

  static constexpr int kTokens = 600;

private:
  Matrix keys_, values_, queries_;
  std::vector<float> by_head_;  // the keys, [2][kTokens][16]
  StatisticsOptions options_;
  std::unique_ptr<Collector> collector_;
};

/// A run at positions [from, to) of a sequence whose cell of position p is first_cell + p.
Run run_of(int from, int to, Run::Ends ends, int first_cell = 0, int first_token = 0) {
  Run run{first_token, to - from, from, ends, {}, from > 0 ? first_cell + from - 1 : -1};
  for (int p = from; p < to; p++) run.cells.push_back(first_cell + p);
  return run;
}

void expect_equal(const LayerStatistics& a, const LayerStatistics& b) {
  EXPECT_EQ(a.n_samples(), b.n_samples());
  EXPECT_EQ(a.density(), b.density());
  EXPECT_EQ(a.residual(), b.residual());
  for (int h = 0; h < 2; h++) {
    EXPECT_DOUBLE_EQ(a.concentration(h), b.concentration(h));  // prompts are added in another order
    EXPECT_EQ(a.samples(Kind::key, h), b.samples(Kind::key, h));
    EXPECT_EQ(a.samples(Kind::value, h), b.samples(Kind::value, h));
    EXPECT_EQ(a.query_moment(h), b.query_moment(h));
  }
}

TEST(Collector, FindsOutWherePromptsEnd) {
  using enum Run::Ends;
  Reading told, found, never;
  for (Reading* reading : {&told, &found, &never}) {
    const bool knows = reading == &told;
    const auto ends = [&](bool last) { return reading == &never ? no : !knows ? unknown : last ? yes : no; };
    // Two prompts of two batches each, the second in the cells of the first; then a token that is decoded.
    reading->batch({run_of(0, 200, ends(false))}, 0);
    reading->batch({run_of(200, 300, ends(true))}, 200);
    reading->batch({run_of(0, 200, ends(false))}, 300);
    reading->batch({run_of(200, 290, ends(true))}, 500);
    reading->batch({run_of(290, 291, no)}, 590);
  }
  const LayerStatistics expected = told.end();
  EXPECT_GT(expected.concentration(0), 0);
  EXPECT_DOUBLE_EQ(expected.residual(), (249.5 * 100 + 544.5 * 90) / 190);
  expect_equal(found.end(), expected);
  EXPECT_EQ(never.end().density(), 0);
}

TEST(Collector, LeavesOutWhatThePoolKeepsExact) {
  // All queries attend to cell 60 above all, which is among the 40 best of the older cells.
  Matrix keys = 0.1f * gaussian(300, 16, 1), values = gaussian(300, 16, 2), queries = 0.1f * gaussian(300, 16, 3);
  queries.array() += 1.0f;
  keys.row(60).array() += 1.0f;
  Collector collector(StatisticsOptions{});
  LayerBatch batch;
  batch.shape = {1, 1, 16, 16};
  batch.keys = keys.data();
  batch.values = values.data();
  batch.queries = queries.data();
  collector.begin({run_of(0, 300, Run::Ends::yes)});
  collector.add(0, batch);
  const CachedKeys cached{keys.data(), 300, [](int token) {
                            std::vector<int> cells(size_t(token) + 1);
                            std::iota(cells.begin(), cells.end(), 0);
                            return cells;
                          }};
  collector.add_attention(0, 0, queries.data(), cached);
  collector.end();
  const LayerStatistics layer = std::move(collector.take_layers(1)[0]);
  EXPECT_GT(layer.concentration(0), 0);
  EXPECT_LT(layer.concentration(0), 1e-6);  // cell 60 alone would make it nearly 1
}

TEST(Collector, SequencesOfOneBatchAreToldApart) {
  using enum Run::Ends;
  Reading together, alone;
  // Tokens of two sequences, the second in cells from 300 on. Each has a prompt of two batches.
  together.batch({run_of(0, 40, unknown), run_of(0, 60, unknown, 300, 40)}, 0);
  together.batch({run_of(40, 240, unknown), run_of(60, 260, unknown, 300, 200)}, 100);
  for (const auto& [from, to, first, ends] :
       {std::tuple{0, 40, 0, no}, {0, 60, 40, no}, {40, 240, 100, yes}, {60, 260, 300, yes}}) {
    alone.batch({run_of(from, to, ends)}, first);
  }
  expect_equal(together.end(), alone.end());
}

TEST(Collector, TakesAnyTokensPowerWhereTheyCannotBeToldApart) {
  using enum Run::Ends;
  Collector collector(StatisticsOptions{});
  const std::vector<float> zeros(64 * 20);
  LayerBatch batch;
  batch.shape = kShape;
  batch.keys = batch.values = batch.queries = zeros.data();
  collector.begin({run_of(0, 10, no), run_of(0, 10, unknown, 300, 10)});
  collector.add(0, batch);
  collector.add_power(0, Collector::Power::residual, {3.0, 5.0}, 20);
  collector.end();
  EXPECT_EQ(collector.take_layers(1)[0].residual(), 4.0);
}

// --- attention from coded keys ---

struct Head {
  Matrix keys, queries;
};

/// Keys of spread-out variances, and 64 queries of each of the `group` heads that read them, every head looking at
/// channels of its own; with `outliers`, three channels at 20, 50 and 100 times the rest's size by a constant offset,
/// as Qwen's keys have them.
Head synthetic_head(bool outliers, unsigned seed, int group = 1) {
  const int dim = 64, n = 8192;
  Head head{gaussian(n, dim, seed), gaussian(64 * group, dim, seed + 1)};
  for (int d = 0; d < dim; d++) head.keys.col(d) *= std::pow(0.93f, float(d));
  const Matrix turn = Eigen::HouseholderQR<Eigen::MatrixXf>(Eigen::MatrixXf(gaussian(dim, dim, 77))).householderQ();
  head.keys = head.keys * turn;
  head.queries *= 0.8f;
  const Matrix looks = gaussian(group, dim, seed + 2);
  for (int h = 1; h < group; h++) {
    head.queries.middleRows(64 * h, 64).array().rowwise() *= (0.5f * looks.row(h).array()).exp();
  }
  if (outliers) {
    const float size[] = {20, 50, -100};
    for (int i = 0; i < 3; i++) head.keys.col(7 + 19 * i).array() += size[i];
  }
  return head;
}

/// Mean KL divergence between attention over all keys and attention over their codes.
double attention_divergence(const Head& head, const HeadCodec& codec) {
  const Eigen::Index n = head.keys.rows(), dim = head.keys.cols();
  Matrix decoded(n, dim);
  std::vector<float> y(dim);
  std::vector<uint8_t> codes(codec.format.n_subspaces());
  for (Eigen::Index i = 0; i < n; i++) {
    codec.transform.forward(head.keys.row(i).data(), y.data());
    const uint16_t scale = encode_vector(codec, y.data(), codes.data());
    decode_vector(codec, codes.data(), scale, y.data());
    codec.transform.inverse(y.data(), decoded.row(i).data());
  }
  double divergence = 0;
  for (Eigen::Index q = 0; q < head.queries.rows(); q++) {
    const auto log_softmax = [&](const Matrix& keys) {
      Eigen::VectorXd s = (keys * head.queries.row(q).transpose()).cast<double>();
      s.array() -= s.maxCoeff();
      s.array() -= std::log(s.array().exp().sum());
      return s;
    };
    const Eigen::VectorXd p = log_softmax(head.keys), r = log_softmax(decoded);
    divergence += (p.array().exp() * (p - r).array()).sum() / double(head.queries.rows());
  }
  return divergence;
}

HeadCodec calibrated(const Head& head, const std::string& transform, double bits) {
  const Eigen::MatrixXd metric = (head.queries.transpose() * head.queries).cast<double>() / double(head.queries.rows());
  FitOptions options;
  options.transform = transform;
  const FittedHead fitted = fit_head(head.keys, metric, Kind::key, {make_format(64, bits)}, options, 1);
  HeadCodec codec;
  codec.kind = Kind::key;
  codec.format = fitted.rates[0].format;
  codec.codebook = fitted.rates[0].codebook;
  std::vector<float> a(64 * 64);
  for (int i = 0; i < 64; i++) {
    for (int j = 0; j < 64; j++) a[i * 64 + j] = fitted.transform.matrix(i, fitted.rates[0].order[j]);
  }
  codec.transform = Transform::dense({fitted.transform.mean.begin(), fitted.transform.mean.end()}, a);
  codec.derive_tables();
  return codec;
}

TEST(Outliers, KltHoldsWherePlainRotationCollapses) {
  for (int group : {1, 8}) {
    SCOPED_TRACE(testing::Message() << "group of " << group);
    const Head plain = synthetic_head(false, 20, group), outliers = synthetic_head(true, 20, group);
    const HeadCodec rotation = make_uncalibrated_codec(Kind::key, make_format(64, 2));
    const double rotation_plain = attention_divergence(plain, rotation);
    const double rotation_outliers = attention_divergence(outliers, rotation);
    const double klt_plain = attention_divergence(plain, calibrated(plain, "klt", 2));
    const double klt_outliers = attention_divergence(outliers, calibrated(outliers, "klt", 2));
    std::printf("group of %d, KL without and with outliers: rotation %.4f, %.4f; klt %.4f, %.4f\n", group,
                rotation_plain, rotation_outliers, klt_plain, klt_outliers);
    EXPECT_LT(klt_plain, rotation_plain);
    EXPECT_LT(klt_outliers, 2 * klt_plain);
    EXPECT_GT(rotation_outliers, 10 * rotation_plain);
  }
}

TEST(Fit, CodedScoresLackHalfTheVarianceOfTheirErrors) {
  // Softmax weighs cells by exp(score). With what their scores lack, coded cells together weigh what the exact ones do.
  const Head head = synthetic_head(false, 40);
  const LayerShape shape = {1, 1, 64, 64};
  StatisticsOptions options;
  options.n_tokens = size_t(head.keys.rows());
  options.context = 1;
  LayerStatistics layer(shape, Rope{}, 1.0f, options, 0);
  const Matrix values = gaussian(int(head.keys.rows()), 64, 41);
  const Matrix queries = head.queries.replicate((head.keys.rows() + head.queries.rows() - 1) / head.queries.rows(), 1);
  layer.add({0, int(head.keys.rows()), head.keys.data(), values.data(), queries.data(), 0});
  FitOptions fit;
  fit.bits = {1};
  fit.uneven = false;
  const HeadCodec codec =
      fit_profile({"test", {shape}, {}}, {layer}, {{{}}}, fit, [](double) {}).codec(0, 0, Kind::key, 1);
  double without = 0, with = 0;  // mean log of the coded cells' weight over the exact cells'
  for (Eigen::Index i = 0; i < head.queries.rows(); i++) {
    std::vector<float> y(64), query(64), x(64);
    codec.transform.query(head.queries.row(i).data(), query.data());
    double exact = 0, coded = 0;
    for (Eigen::Index k = 0; k < head.keys.rows(); k++) {
      std::vector<uint8_t> codes(codec.format.n_subspaces());
      codec.transform.forward(head.keys.row(k).data(), y.data());
      decode_vector(codec, codes.data(), encode_vector(codec, y.data(), codes.data()), y.data());
      codec.transform.inverse(y.data(), x.data());
      exact += std::exp(double(head.queries.row(i).dot(head.keys.row(k))));
      coded += std::exp(double(head.queries.row(i).dot(Eigen::Map<const Eigen::RowVectorXf>(x.data(), 64))));
    }
    without += std::log(coded / exact) / double(head.queries.rows());
    with += (std::log(coded / exact) + codec.score_bias(query.data())) / double(head.queries.rows());
  }
  std::printf("log of the weight of coded cells: %.4f, with what their scores lack %.4f\n", without, with);
  EXPECT_LT(without, 0);
  EXPECT_LT(std::fabs(with), 0.35 * std::fabs(without));
}

TEST(Fit, MoreBitsCostLess) {
  const Head head = synthetic_head(false, 30);
  const Eigen::MatrixXd metric = Eigen::MatrixXd::Identity(64, 64);
  std::vector<Format> formats;
  for (double bits : {1.0, 1.25, 1.5, 2.0, 3.0, 4.0}) formats.push_back(make_format(64, bits));
  const FittedHead fitted = fit_head(head.keys, metric, Kind::key, formats, {}, 1);
  for (size_t i = 1; i < formats.size(); i++) EXPECT_LT(fitted.rates[i].distortion, fitted.rates[i - 1].distortion);
}

TEST(Fit, DoesNotDependOnThreads) {
  const LayerShape shape = {2, 4, 16, 16};
  StatisticsOptions options;
  options.n_tokens = 512;
  std::vector<LayerStatistics> layers;
  layers.emplace_back(shape, Rope{false, {1.0, 0.1}}, 0.25f, options, 0);
  const Matrix k = gaussian(512, 32, 1), v = gaussian(512, 32, 2), q = gaussian(512, 64, 3);
  layers[0].add({0, 512, k.data(), v.data(), q.data()});
  layers[0].add_attention(0, *shares_of(std::vector<float>(400, 1.0f)));
  EXPECT_NEAR(layers[0].density(), 0.95, 1e-3);  // even attention: what is outside the top 5 %
  EXPECT_EQ(layers[0].n_samples(), 504u);        // all but the sinks

  const auto fit = [&](int n_threads) {
    FitOptions fit_options;
    fit_options.bits = {2, 1};
    fit_options.n_threads = n_threads;
    return fit_profile({"test", {shape}, {}}, layers, {{{}, {}}}, fit_options, [](double) {});
  };
  const Profile one = fit(1), three = fit(3);
  EXPECT_EQ(one.keys[0].matrix, three.keys[0].matrix);
  for (double bits : {2.0, 1.0}) {
    EXPECT_EQ(one.keys[0].by_bits.at(bits).words, three.keys[0].by_bits.at(bits).words);
    EXPECT_EQ(one.values[0].by_bits.at(bits).words, three.values[0].by_bits.at(bits).words);
  }
  // The average rate is the target.
  EXPECT_LE(one.format(0, Kind::key, 2).bits() + one.format(0, Kind::value, 2).bits(), 4.0);
  EXPECT_NO_THROW(one.codec(0, 1, Kind::value, 2));
}

TEST(Fit, LayersOfAnotherBudgetTakeNoBits) {
  const LayerShape shape = {1, 2, 16, 16};
  StatisticsOptions options;
  options.n_tokens = 512;
  std::vector<LayerStatistics> layers;
  const Matrix k = gaussian(512, 16, 1), v = gaussian(512, 16, 2), q = gaussian(512, 32, 3);
  for (int layer = 0; layer < 2; layer++) {
    layers.emplace_back(shape, Rope{false, {1.0, 0.1}}, 0.25f, options, layer);
    layers[layer].add({0, 512, k.data(), v.data(), q.data()});
    // The first attends evenly, so that errors of single cells hardly matter; the second to one cell.
    std::vector<float> attention(400, layer == 0 ? 1.0f : 1e-6f);
    attention[150] = 1.0f;
    layers[layer].add_attention(0, *shares_of(attention));
  }
  const auto bits_of = [&](const std::vector<int>& budgets, int layer) {
    FitOptions fit_options;
    fit_options.bits = {2};
    fit_options.budgets = budgets;
    const Profile profile = fit_profile({"test", {shape, shape}, {}}, layers, {{{}}, {{}}}, fit_options, [](double) {});
    return profile.format(layer, Kind::key, 2).bits() + profile.format(layer, Kind::value, 2).bits();
  };
  EXPECT_LT(bits_of({}, 0), 3.5);
  EXPECT_LE(bits_of({}, 0) + bits_of({}, 1), 8.0);
  for (int layer : {0, 1}) {
    EXPECT_GE(bits_of({0, 1}, layer), 3.5) << layer;
    EXPECT_LE(bits_of({0, 1}, layer), 4.0) << layer;
  }
  // What a norm behind the output makes greater weighs more.
  const double before = bits_of({}, 0);
  EXPECT_EQ(layers[0].output_weight(), 1.0);
  layers[0].add_output(2.0);
  layers[0].add_normalized(2e6);
  EXPECT_DOUBLE_EQ(layers[0].output_weight(), 1e6);
  EXPECT_GT(bits_of({}, 0), before);
}

/// A layer that saw two kinds of text, each in a sequence of 2048 tokens. The last 8 components, of 16, of the keys
/// have a deviation of 0.02; of those of the second kind that are held out, of `other`.
LayerStatistics two_kinds(float other, int left_out = -1) {
  StatisticsOptions options;
  options.left_out_kind = left_out;
  options.n_tokens = 4096;
  options.n_text_kinds = 2;
  LayerStatistics layer({1, 2, 16, 16}, Rope{}, 0.25f, options, 0);
  for (int kind = 0; kind < 2; kind++) {
    Matrix k = gaussian(2048, 16, 1 + kind), v = gaussian(2048, 16, 3 + kind), q = gaussian(2048, 32, 5 + kind);
    k.topRightCorner(kind == 1 ? 1536 : 2048, 8) *= 0.02f;
    if (kind == 1) k.bottomRightCorner(512, 8) *= other;
    layer.add({0, 2048, k.data(), v.data(), q.data(), kind});
    layer.add_attention(0, *shares_of(std::vector<float>(400, 1.0f)));
  }
  return layer;
}

TEST(TextKinds, HoldOutTheLastQuarterOfASequence) {
  const LayerStatistics layer = two_kinds(30);
  EXPECT_EQ(layer.samples(Kind::key, 0).rows(), 2 * (1536 - 8));  // sinks are no samples
  EXPECT_LT(layer.samples(Kind::key, 0).cwiseAbs().maxCoeff(), 6);
  const Matrix first = layer.held_out(Kind::key, 0, 0, 128), second = layer.held_out(Kind::key, 0, 1, 10000);
  EXPECT_EQ(first.rows(), 128);
  EXPECT_LT(first.cwiseAbs().maxCoeff(), 6);
  EXPECT_EQ(second.rows(), 512);
  EXPECT_GT(second.cwiseAbs().maxCoeff(), 30);
  // The mean over all queries is that of the kinds, which have as many.
  const Eigen::MatrixXd both = layer.query_moment(0, 0) + layer.query_moment(0, 1);
  EXPECT_LT((both / 2 - layer.query_moment(0)).norm(), 1e-5);
}

TEST(TextKinds, NothingIsLearnedOfAKindThatIsLeftOut) {
  const LayerStatistics layer = two_kinds(30, /*left_out=*/1);
  EXPECT_EQ(layer.samples(Kind::key, 0).rows(), 1536 - 8);
  EXPECT_EQ(layer.held_out(Kind::key, 0, 1, 10000).rows(), 2048 - 8);
  EXPECT_LT((layer.query_moment(0, 0) - layer.query_moment(0)).norm(), 1e-5);
  EXPECT_GT((layer.query_moment(0, 1) - layer.query_moment(0)).norm(), 1e-3);
  // Its keys are served badly, which is reported, and do not make the codec fall back.
  FitOptions options;
  options.bits = {2};
  FitReport report;
  const Profile profile = fit_profile(
      {"test", {layer.shape()}, {}}, {layer}, {{{}}}, options, [](double) {}, &report);
  const HeadCodec codec = profile.codec(0, 0, Kind::key, 2);
  EXPECT_NE(codec.codebook.words, builtin_codebook(codec.format).words);
  ASSERT_EQ(report.rates.size(), 1u);
  EXPECT_LT(report.rates[0].noise[0], 1.0);
  EXPECT_GT(report.rates[0].noise[1], report.rates[0].noise[0]);
}

TEST(TextKinds, TheBuiltInCodecStretchesKeysByTheModelsNorms) {
  LayerStatistics layer = two_kinds(1);
  std::vector<float> query(16, 1.0f), key(16, 1.0f);
  key[3] = 100;
  layer.set_norms(query, key);
  const std::vector<float> stretch = layer.key_stretch(0);
  ASSERT_EQ(stretch.size(), 16u);
  FitOptions options;
  options.bits = {2};
  FitReport report;
  const Profile profile = fit_profile(
      {"test", {layer.shape()}, {}}, {layer}, {{{}}}, options, [](double) {}, &report);
  ASSERT_GE(report.n_built_in, 1u);
  const HeadCodec codec = profile.codec(0, 0, Kind::key, 2),
                  built_in = make_uncalibrated_codec(Kind::key, codec.format, stretch);
  const Matrix x = gaussian(1, 16, 9);
  std::vector<float> y(16), z(16);
  codec.transform.forward(x.data(), y.data());
  built_in.transform.forward(x.data(), z.data());
  for (int d = 0; d < 16; d++) EXPECT_NEAR(y[d], z[d], 2e-3) << d;  // f16
}

TEST(TextKinds, WhatServesAKindBadlyKeepsTheBuiltInCodec) {
  const auto fit = [](const LayerStatistics& layer, FitReport& report) {
    FitOptions options;
    options.bits = {2};
    return fit_profile(
        {"test", {layer.shape()}, {}}, {layer}, {{{}}}, options, [](double) {}, &report);
  };
  FitReport good, bad;
  fit(two_kinds(0.02f), good);
  EXPECT_EQ(good.n_heads, 2u);  // the keys and the values of one KV head
  ASSERT_EQ(good.rates.size(), 1u);
  ASSERT_EQ(good.rates[0].noise.size(), 2u);
  EXPECT_LT(good.rates[0].noise[1], 1.0);
  // Codebooks that were fitted to other keys than those held out.
  const Profile profile = fit(two_kinds(1), bad);
  EXPECT_GE(bad.n_built_in, 1u);
  const HeadCodec codec = profile.codec(0, 0, Kind::key, 2),
                  built_in = make_uncalibrated_codec(Kind::key, codec.format);
  EXPECT_EQ(codec.codebook.words, built_in.codebook.words);
  const Matrix x = gaussian(1, 16, 9);
  std::vector<float> y(16), z(16);
  codec.transform.forward(x.data(), y.data());
  built_in.transform.forward(x.data(), z.data());
  for (int d = 0; d < 16; d++) EXPECT_NEAR(y[d], z[d], 2e-3);  // f16
}

}  // namespace
}  // namespace thimble
