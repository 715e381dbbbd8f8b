#include "calibrate/statistics.h"

#include <algorithm>
#include <functional>
#include <numeric>

#include "codec/half.h"

namespace thimble {
namespace {

constexpr int kRecent = 128;  // last cells, which stay exact too and are left out of concentration()
// Tokens that are rotated to one random position together.
constexpr int kStretch = 64;
// TailorKV's alpha: the share of cells whose attention is compared with the rest.
constexpr double kDominantShare = 0.05;
// Of several kinds of text, every fourth of such stretches is held out: of a sequence of 2048 tokens, the last one.
constexpr int kHeldOutStretch = 512;

bool is_held_out(int position) {
  return position / kHeldOutStretch % 4 == 3;
}

}  // namespace

std::optional<AttentionShares> shares_of(std::vector<float> weights, const std::vector<bool>& in_pool) {
  const size_t dominant = size_t(double(weights.size()) * kDominantShare);
  double all = 0, squares = 0;
  for (float w : weights) all += w;
  if (dominant == 0 || !(all > 0)) return std::nullopt;
  for (size_t i = 0; i + kRecent < weights.size(); i++) {
    if (in_pool.empty() || !in_pool[i]) squares += double(weights[i]) * weights[i];
  }
  std::nth_element(weights.begin(), weights.begin() + dominant - 1, weights.end(), std::greater<>());
  double strongest = 0;
  for (size_t i = 0; i < dominant; i++) strongest += weights[i];
  return AttentionShares{1.0 - strongest / all, squares / (all * all)};
}

LayerStatistics::LayerStatistics(const LayerShape& shape, Rope rope, float score_scale,
                                 const StatisticsOptions& options, int layer)
    : shape_(shape),
      rope_(std::move(rope)),
      score_scale_(score_scale),
      options_(options),
      random_(options.seed * 1000003 + uint64_t(layer)),
      stride_(std::max<size_t>(1, (options.n_tokens + options.max_samples - 1) / options.max_samples)),
      query_sum_(shape.n_kv_heads, Eigen::MatrixXd::Zero(shape.key_dim, shape.key_dim)),
      concentration_sum_(shape.n_kv_heads, 0.0),
      n_attentions_(shape.n_kv_heads, 0) {
  OfTextKind none;
  if (options.n_text_kinds > 1) {
    none.query_sum.assign(shape.n_kv_heads, Eigen::MatrixXf::Zero(shape.key_dim, shape.key_dim));
  }
  of_text_kind_.assign(options.n_text_kinds, none);
}

void LayerStatistics::add(const LayerActivations& in) {
  const int group = shape_.n_heads / shape_.n_kv_heads, key_dim = shape_.key_dim;
  const size_t key_row = size_t(shape_.n_kv_heads) * key_dim, query_row = size_t(shape_.n_heads) * key_dim;
  const size_t value_row = size_t(shape_.n_kv_heads) * shape_.value_dim;
  std::uniform_real_distribution<double> anywhere(0.0, double(options_.context));
  std::vector<float> keys(key_row);
  std::vector<Matrix> queries(shape_.n_kv_heads, Matrix(Eigen::Index(in.n_tokens) * group, key_dim));
  const bool is_left_out = in.text_kind == options_.left_out_kind;
  Rope::Turn turn;
  for (int t = 0; t < in.n_tokens; t++) {
    if (t % kStretch == 0) turn = rope_.by(anywhere(random_) - (in.first_position + t));
    for (int h = 0; h < shape_.n_heads; h++) {
      float* q = queries[h / group].row(Eigen::Index(t) * group + h % group).data();
      std::copy_n(in.queries + t * query_row + size_t(h) * key_dim, key_dim, q);
      rope_.apply(turn, q);
    }
    if (in.first_position + t < kSinks || n_seen_++ % stride_ != 0) continue;
    std::copy_n(in.keys + t * key_row, key_row, keys.data());
    for (int h = 0; h < shape_.n_kv_heads; h++) rope_.apply(turn, &keys[size_t(h) * key_dim]);
    for (float v : keys) keys_.push_back(float_to_half(v));
    for (size_t i = 0; i < value_row; i++) values_.push_back(float_to_half(in.values[t * value_row + i]));
    sample_text_kind_.push_back(uint8_t(in.text_kind));
    sample_is_held_out_.push_back(is_left_out || (options_.n_text_kinds > 1 && is_held_out(in.first_position + t)));
  }
  OfTextKind& of_kind = of_text_kind_.at(in.text_kind);
  for (int h = 0; h < shape_.n_kv_heads; h++) {
    const Eigen::MatrixXf moment = queries[h].transpose() * queries[h];
    if (!is_left_out) query_sum_[h] += moment.cast<double>();
    if (!of_kind.query_sum.empty()) of_kind.query_sum[h] += moment;
  }
  if (!is_left_out) n_queries_ += size_t(in.n_tokens) * group;
  of_kind.n_queries += size_t(in.n_tokens) * group;
}

void LayerStatistics::add_attention(int kv_head, const AttentionShares& shares) {
  density_sum_ += shares.outside;
  concentration_sum_[kv_head] += shares.squares;
  n_attentions_[kv_head]++;
}

float LayerStatistics::density() const {
  const size_t n = std::accumulate(n_attentions_.begin(), n_attentions_.end(), size_t{0});
  return n ? float(density_sum_ / double(n)) : 0.0f;
}

double LayerStatistics::concentration(int kv_head) const {
  return n_attentions_[kv_head] ? concentration_sum_[kv_head] / double(n_attentions_[kv_head]) : 0.0;
}

Matrix LayerStatistics::rows(Kind kind, int kv_head, const std::vector<size_t>& chosen) const {
  const auto& from = kind == Kind::key ? keys_ : values_;
  const size_t dim = shape_.dim(kind), row = shape_.n_kv_heads * dim;
  Matrix out = Matrix::Zero(Eigen::Index(chosen.size()), Eigen::Index(dim));
  for (size_t i = 0; i < chosen.size(); i++) {
    for (size_t d = 0; d < dim; d++) out(i, d) = half_to_float(from[chosen[i] * row + kv_head * dim + d]);
  }
  return out;
}

Matrix LayerStatistics::samples(Kind kind, int kv_head) const {
  std::vector<size_t> chosen;
  for (size_t i = 0; i < n_samples(); i++) {
    if (!sample_is_held_out_[i]) chosen.push_back(i);
  }
  return rows(kind, kv_head, chosen);
}

Matrix LayerStatistics::held_out(Kind kind, int kv_head, int text_kind, size_t most) const {
  std::vector<size_t> all, chosen;
  for (const bool wanted : {true, false}) {
    for (size_t i = 0; i < n_samples(); i++) {
      if (sample_text_kind_[i] == text_kind && sample_is_held_out_[i] == wanted) all.push_back(i);
    }
    if (!all.empty()) break;
  }
  const size_t n = std::min(most, all.size());
  for (size_t i = 0; i < n; i++) chosen.push_back(all[i * all.size() / n]);
  return rows(kind, kv_head, chosen);
}

Eigen::MatrixXd LayerStatistics::query_moment(int kv_head) const {
  return query_sum_[kv_head] / double(std::max<size_t>(1, n_queries_));
}

Eigen::MatrixXd LayerStatistics::query_moment(int kv_head, int text_kind) const {
  const OfTextKind& of = of_text_kind_.at(text_kind);
  if (of.query_sum.empty()) return query_moment(kv_head);
  return of.query_sum[kv_head].cast<double>() / double(std::max<size_t>(1, of.n_queries));
}

}  // namespace thimble
