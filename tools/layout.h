// The contexts that `eval`, `bench` and `doctor` speak of: made as llama-server makes them, and what caches they have.
#pragma once

#include <llama.h>

#include <string>
#include <vector>

#include "engine/layer_plan.h"
#include "profile/profile.h"

namespace thimble {

/// A context as llama-server makes it without flags: four sequences that share a unified cache, batches of 2048 tokens
/// that the model reads 512 at a time, and for layers with a sliding window no more cells than the window needs.
/// `thimble run` differs in its one sequence, which changes nothing but the cells of window layers.
struct ContextShape {
  int n_cells = 8192;   // that a sequence may have
  int n_sequences = 4;  // -np
  bool unified = true;  // -kvu: all sequences in one stream of n_cells; else a stream of n_cells each
  int n_batch = 2048, n_ubatch = 512;
};

/// With flash attention. `n_cells` is rounded up to what llama.cpp pads to.
llama_context_params context_params(const ContextShape& shape, int n_threads);

/// The caches of a model in such a context.
struct CacheLayout {
  ModelShape shape;  // layers without a cache of their own have no KV heads
  struct Layer {
    int64_t cells_per_stream = 0;
    bool is_window = false;
  };
  std::vector<Layer> layers;  // as shape.layers
  int n_streams = 1;
  int context_length = 0;  // that the model was trained for, 0: its file does not say

  int64_t cells(int layer) const { return layers[layer].cells_per_stream * n_streams; }
  /// All layers with caches of one length, none of a sliding window.
  static CacheLayout plain(const ModelShape& shape, int64_t n_cells);
};

/// As llama.cpp lays them out, without loading the model or allocating a cache. Throws std::runtime_error where the
/// file is no model or llama.cpp makes no such context of it.
CacheLayout read_layout(const std::string& model, const ContextShape& shape);

/// What becomes of every cache, as the plugin plans it on the CPU. Throws std::runtime_error as CachePlanner does.
std::vector<LayerPlan> plan_layers(const Settings& settings, const CacheLayout& layout);
PlanTotals plan_totals(const Settings& settings, const CacheLayout& layout);

}  // namespace thimble
