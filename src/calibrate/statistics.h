// The statistics of one pass over a text, which fitting needs: a bounded sample of keys and values of every KV head,
// the second moments of the queries that attend to the keys, and how broadly each layer attends.
#pragma once

#include <Eigen/Core>
#include <cstdint>
#include <optional>
#include <random>
#include <vector>

#include "calibrate/rope.h"
#include "calibrate/transforms.h"
#include "codec/head_codec.h"
#include "profile/profile.h"

namespace thimble {

/// The first cells of a sequence are attention sinks, whose keys are unlike all others. The cache keeps sinks exact
/// (cache/pool.h), so the keys and values of these cells are left out.
inline constexpr int kSinks = 8;

struct StatisticsOptions {
  /// The statistics must hold for positions below this one: vectors are rotated to random positions below it.
  int context = 8192;
  /// Tokens of the whole pass. Every k-th is kept as a sample, such that there are at most max_samples.
  size_t n_tokens = 0;
  size_t max_samples = 32768;
  uint64_t seed = 1;
  /// How many kinds of text there are. With several, a part of each is held out: fitting chooses by it.
  int n_text_kinds = 1;
  /// A kind that nothing learns from: what codes do to it is measured alone. -1: none.
  int left_out_kind = -1;
};

/// Keys, values and queries of some consecutive tokens of one sequence, of one layer. Keys and queries are rotated by
/// their positions already.
struct LayerActivations {
  int first_position = 0;
  int n_tokens = 0;
  const float* keys = nullptr;     // [n_tokens][n_kv_heads][key_dim]
  const float* values = nullptr;   // [n_tokens][n_kv_heads][value_dim]
  const float* queries = nullptr;  // [n_tokens][n_heads][key_dim]
  int text_kind = 0;               // of the text that they are of
};

/// What the attention weights of one query show of its layer.
struct AttentionShares {
  double outside = 0;  // of the attention, outside the strongest 5 % of cells
  double squares = 0;  // sum of p^2 over the cells that the cache codes, p the normalized weights
};
/// `weights`: those of one query over the cells that it sees, in the order of the sequence, not normalized. `in_pool`:
/// which of them stay exact as the cache's pool; empty: none. Empty where there are too few cells to tell.
std::optional<AttentionShares> shares_of(std::vector<float> weights, const std::vector<bool>& in_pool = {});

class LayerStatistics {
public:
  /// `score_scale`: the factor that the layer multiplies q.k by.
  LayerStatistics(const LayerShape& shape, Rope rope, float score_scale, const StatisticsOptions& options, int layer);

  void add(const LayerActivations& activations);

  /// Takes the weights that the model multiplies normalized queries and keys by, where it does, as key_stretches takes
  /// them: the codec without calibration depends on them.
  void set_norms(const std::vector<float>& query_weights, const std::vector<float>& key_weights) {
    key_stretches_ = key_stretches(query_weights, key_weights, shape_.n_kv_heads, shape_.key_dim);
  }
  /// What a KV head's keys are multiplied by before they are coded without calibration; empty: by nothing.
  std::vector<float> key_stretch(int kv_head) const {
    return key_stretches_.empty() ? std::vector<float>() : key_stretches_[kv_head];
  }

  /// Adds what the attention weights of one query show.
  void add_attention(int kv_head, const AttentionShares& shares);
  /// Adds |x|^2 of one token's residual stream behind the layer.
  void add_residual(double square) { residual_sum_ += square, n_residuals_++; }
  /// Takes |x|^2 of what the layer's attention puts out for one token, behind its output projection; and of the same
  /// behind a norm, where the model has one there.
  void add_output(double square) { output_sum_ += square, n_outputs_++; }
  void add_normalized(double square) { normalized_sum_ += square, n_normalized_++; }

  const LayerShape& shape() const { return shape_; }
  /// The sampled keys or values of a KV head, [n_samples][head_dim], but for those held out.
  Matrix samples(Kind kind, int kv_head) const;
  /// At most `most` samples of a kind of text that were held out, spread evenly over them; of all its samples where
  /// none was.
  Matrix held_out(Kind kind, int kv_head, int text_kind, size_t most) const;
  /// E[q q^T] over the queries of the group, but for those of a kind that is left out, [key_dim][key_dim].
  Eigen::MatrixXd query_moment(int kv_head) const;
  /// The same over a kind of text. With one kind only, it is that of all.
  Eigen::MatrixXd query_moment(int kv_head, int text_kind) const;
  int n_text_kinds() const { return options_.n_text_kinds; }
  int left_out_kind() const { return options_.left_out_kind; }
  /// See Profile::density.
  float density() const;
  /// Mean over the queries of the sum of p^2 over coded cells, p the attention weights: the factor by which independent
  /// errors of single cells come through in the weighted sum.
  double concentration(int kv_head) const;
  /// Mean |x|^2 of the residual stream, 1 where it was not seen.
  double residual() const { return n_residuals_ ? residual_sum_ / double(n_residuals_) : 1.0; }
  /// What noise in the attention's output weighs, as power: one over the residual stream's, or, where a norm stands
  /// behind the output, what that norm multiplies it by. The stream's power does not count there: most of it lies in
  /// few components that such models' norms scale down (docs/results/quality.md has both rules' figures).
  double output_weight() const {
    if (n_normalized_ == 0 || n_outputs_ == 0 || output_sum_ <= 0) return 1.0 / residual();
    return normalized_sum_ / double(n_normalized_) / (output_sum_ / double(n_outputs_));
  }
  float score_scale() const { return score_scale_; }
  size_t n_samples() const { return sample_is_held_out_.size(); }

private:
  struct OfTextKind {
    std::vector<Eigen::MatrixXf> query_sum;  // [n_kv_heads]; empty with one kind of text
    size_t n_queries = 0;
  };
  Matrix rows(Kind kind, int kv_head, const std::vector<size_t>& chosen) const;

  LayerShape shape_;
  Rope rope_;
  float score_scale_;
  StatisticsOptions options_;
  std::mt19937_64 random_;
  size_t stride_;  // every stride-th token is kept
  size_t n_seen_ = 0, n_queries_ = 0;
  std::vector<uint16_t> keys_, values_;     // f16, [n_samples][n_kv_heads][dim]
  std::vector<uint8_t> sample_text_kind_;   // [n_samples]
  std::vector<bool> sample_is_held_out_;    // [n_samples]
  std::vector<Eigen::MatrixXd> query_sum_;  // [n_kv_heads]
  std::vector<OfTextKind> of_text_kind_;    // [n_text_kinds]
  std::vector<std::vector<float>> key_stretches_;
  double density_sum_ = 0, residual_sum_ = 0;
  std::vector<double> concentration_sum_;  // [n_kv_heads]
  std::vector<size_t> n_attentions_;       // [n_kv_heads]
  size_t n_residuals_ = 0;
  double output_sum_ = 0, normalized_sum_ = 0;
  size_t n_outputs_ = 0, n_normalized_ = 0;
};

}  // namespace thimble
