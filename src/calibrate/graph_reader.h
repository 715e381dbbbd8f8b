// Reads keys, values, queries and norms off the nodes of ggml graphs as they run, for a Collector. Works with any model
// that llama.cpp runs with flash attention and a KV cache in f16. Compiled for each backend API version of ggml that
// the plugin is built for, and for the tools.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <unordered_map>
#include <vector>

#include "calibrate/collector.h"

struct ggml_tensor;

namespace thimble {

/// The layer whose output projection ("blk.7.attn_output.weight", src[0]) a node multiplies by, or -1.
int layer_of_output(const ggml_tensor* node);

class GraphReader {
public:
  /// `n_layers`: the model's number of layers. Nodes of others are not read.
  GraphReader(Collector& collector, int n_layers) : collector_(collector), n_layers_(n_layers) {}

  // To be called before each graph, one of the two:

  /// The graph's tokens have positions from first_position on and are of one sequence, which began in cell 0 of an
  /// empty cache. `last`: the sequence ends with them. `text_kind`: as in Run.
  void begin(int first_position, bool last, int n_tokens, int text_kind = 0);
  /// The graph itself tells which tokens are of which sequence, by positions and mask. `rope`: a node that rotates by
  /// the tokens' positions, or null where the model has none.
  void begin(const ggml_tensor* rope);

  /// Whether `read` must be called when the node is computed, before nodes behind it run.
  bool wants(const ggml_tensor* node) const;
  /// Throws std::runtime_error with a sentence where the model keeps its keys or values in an unknown way.
  void read(const ggml_tensor* node);

  /// The tokens that were read so far.
  size_t n_tokens() const { return n_tokens_; }

private:
  struct Rows {
    std::vector<float> values;  // [n_tokens][row]
    std::vector<int64_t> cells;
  };
  struct Pending {  // of one layer, until its attention node comes
    Rows keys, values;
    std::vector<float> key_norm;
    Rope rope;
    RopeShape rope_shape;
  };
  // The cells of one KV cache: when each was written, counted in tokens; 0: not while this reader looked on.
  struct Cache {
    std::vector<uint64_t> written;
    uint64_t before_graph = 0;  // cells written later than this are the graph's own
    bool is_new_graph = true;
  };

  void stored(const ggml_tensor* node, int layer, Kind kind);
  void attended(const ggml_tensor* node, int layer);
  void measured(const ggml_tensor* node, int layer, Collector::Power what);
  Cache& cache_behind(const ggml_tensor* keys);
  void note_cells(const ggml_tensor* keys, const std::vector<int64_t>& cells);
  const std::vector<uint16_t>& mask_of(const ggml_tensor* node);
  std::span<const uint16_t> mask_row(const ggml_tensor* node, int token);
  std::vector<Run> find_runs(const ggml_tensor* node, const std::vector<int64_t>& cells);
  std::vector<int> seen_by(const ggml_tensor* node, int token);

  Collector& collector_;
  int n_layers_;
  size_t n_tokens_ = 0;
  std::map<int, Pending> pending_;
  // Of the graph that runs:
  bool has_runs_ = false;
  bool is_left_out_ = false;  // nothing of it is kept
  bool is_plain_ = false;     // one sequence, in cells that are its positions
  int first_position_ = 0;    // then: of its first token
  int n_tokens_of_graph_ = 0;
  const ggml_tensor* rope_ = nullptr;
  std::map<const void*, std::vector<uint16_t>> masks_;  // by their data
  // Over all graphs:
  std::unordered_map<const void*, Cache> caches_;  // by the buffer that their tensors lie in
  uint64_t clock_ = 0;
};

}  // namespace thimble
