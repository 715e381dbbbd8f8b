// Reads keys, values and queries off a running model: an eval callback for a llama.cpp context (`cb_eval`), which sees
// every node of the graph. Works with any model that llama.cpp runs with flash attention and a KV cache in f16.
#pragma once

#include <map>
#include <optional>
#include <vector>

#include "calibrate/statistics.h"

struct ggml_tensor;

namespace thimble {

class Collector {
public:
  /// `n_layers`: the model's number of layers.
  Collector(int n_layers, const StatisticsOptions& options);

  /// To be called before each graph: its tokens have positions from first_position on, are of one sequence, and are no
  /// more than the context's n_ubatch. `last`: the sequence ends with them, and its last queries count for the density.
  void begin(int first_position, bool last) {
    first_position_ = first_position;
    last_ = last;
  }

  /// For `cb_eval`, with the Collector as its user data.
  static bool callback(ggml_tensor* node, bool ask, void* collector);

  /// Throws std::runtime_error with the first error of the callback, which must not throw through llama.cpp.
  void check() const;

  /// The shapes of the layers that were seen; the caller fills in the architecture.
  ModelShape shape() const;
  std::vector<LayerStatistics> take_layers();

private:
  struct Rows {
    std::vector<float> values;  // [n_tokens][row]
    int n_tokens = 0;
  };
  struct Pending {  // of one layer, until its attention node comes
    Rows keys, values;
    Rope rope;
    RopeShape rope_shape;
  };

  void stored(const ggml_tensor* node, int layer, Kind kind);
  void attended(const ggml_tensor* node, int layer);
  /// Hands |x|^2 of each token of a node to `add`.
  void measure(const ggml_tensor* node, int layer, void (LayerStatistics::*add)(double));

  StatisticsOptions options_;
  int first_position_ = 0;
  bool last_ = false;
  std::map<int, Pending> pending_;
  std::vector<std::optional<LayerStatistics>> layers_;
  RopeShape rope_shape_;
  std::string error_;
};

}  // namespace thimble
