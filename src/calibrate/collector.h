// Collects the statistics of a running model's layers, batch by batch: whoever sees the model run (graph_reader.h)
// hands over what the layers wrote and attended to. Knows no ggml.
//
// How broadly a layer attends, and the power of what lies behind it, are taken where a prompt ends: for the last 32
// queries of its last batch. Whether a batch is a prompt's last may show only when the next one comes, so what is
// measured of it can wait.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "calibrate/statistics.h"

namespace thimble {

/// Some consecutive tokens of one sequence in a batch.
struct Run {
  int first_token = 0, n_tokens = 0;  // in the batch
  int first_position = 0;
  /// Whether the prompt ends with the run. `unknown`: it does unless another run of the same sequence goes on from it
  /// that is no `no` either.
  enum class Ends { no, yes, unknown } ends = Ends::no;
  std::vector<int64_t> cells;  // that its tokens are written to, one each; may be empty where `ends` is known
  int64_t previous_cell = -1;  // of the token before the first; -1: there is none
  int text_kind = 0;           // below StatisticsOptions::n_text_kinds
};

/// What a layer wrote and attended to in a batch. Keys and queries are rotated by their positions already.
struct LayerBatch {
  LayerShape shape;
  Rope rope;
  RopeShape rope_shape;
  float score_scale = 1;                    // that the layer multiplies q.k by
  std::vector<float> query_norm, key_norm;  // as LayerStatistics::set_norms takes them
  const float* keys = nullptr;              // [n_tokens][n_kv_heads][key_dim]
  const float* values = nullptr;            // [n_tokens][n_kv_heads][value_dim]
  const float* queries = nullptr;           // [n_tokens][n_heads][key_dim]
};

/// The keys that a run attends to.
struct CachedKeys {
  const float* keys = nullptr;  // [n_kv_heads][n_cells][key_dim]
  int n_cells = 0;
  /// The cells that a token of the batch sees, in the order of its sequence.
  std::function<std::vector<int>(int token)> seen_by;
};

class Collector {
public:
  explicit Collector(const StatisticsOptions& options) : options_(options) {}

  /// A batch begins.
  void begin(std::vector<Run> runs);
  /// There are no more batches: what was measured of prompts counts.
  void end() { begin({}); }
  const std::vector<Run>& runs() const { return runs_; }
  /// Whether a prompt ends with this run, as far as is known: then add_attention and add_power are called for it.
  static bool may_end(const Run& run) { return run.ends != Run::Ends::no; }
  bool may_end() const;

  void add(int layer, const LayerBatch& batch);
  /// `run`: its index. `queries` as in LayerBatch.
  void add_attention(int layer, size_t run, const float* queries, const CachedKeys& cached);

  enum class Power { residual, output, normalized };  // see LayerStatistics::add_residual and so on
  /// |x|^2 of rows behind the layer: of all tokens of the batch, or of some, which must not be told apart.
  void add_power(int layer, Power what, const std::vector<double>& squares, int n_tokens_of_batch);

  /// Whether the layer was seen.
  bool has(int layer) const { return size_t(layer) < layers_.size() && layers_[layer].has_value(); }
  const LayerShape& shape_of(int layer) const { return layers_.at(layer)->shape(); }
  /// The shapes of the first n_layers layers; the caller fills in the architecture.
  ModelShape shape(int n_layers) const;
  std::vector<LayerStatistics> take_layers(int n_layers);

private:
  /// What was measured of a run that may end a prompt.
  struct Measured {
    struct Attention {
      int kv_head;
      AttentionShares shares;
    };
    struct Layer {
      std::vector<Attention> attention;
      std::vector<double> power[3];  // by Power
    };
    int64_t last_cell = -1;
    std::vector<Layer> layers;

    Layer& of(int layer);
  };
  void count(const Measured& measured);

  StatisticsOptions options_;
  std::vector<Run> runs_;
  std::vector<Measured> measured_;  // of this batch, by run
  std::vector<Measured> waiting_;   // of earlier batches, oldest first: these may be the last of their prompts
  std::vector<std::optional<LayerStatistics>> layers_;
  RopeShape rope_shape_;
};

}  // namespace thimble
