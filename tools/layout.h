// The contexts of `eval`, `bench` and `doctor`, which are made as llama-server makes them, and the caches that they
// have.
#pragma once

#include <llama.h>

#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/layer_plan.h"
#include "profile/profile.h"

namespace thimble {

/// A context as llama-server makes it without flags: four sequences that share a unified cache, batches of 2048 tokens
/// that the model reads 512 at a time, and for layers with a sliding window no more cells than the window needs.
/// `thimble run` has one sequence, which makes no difference but to the cells of layers with a sliding window.
struct ContextShape {
  int n_cells = 8192;   // cells that a sequence may have
  int n_sequences = 4;  // -np
  bool unified = true;  // -kvu: all sequences in one stream of n_cells; else a stream of n_cells each
  int n_batch = 2048, n_ubatch = 512;
  HostDevice device = {"CPU", ""};  // that the caches are on; of several the first
};

/// The parameters of such a context, with flash attention. `n_cells` is rounded up as llama.cpp pads it.
llama_context_params context_params(const ContextShape& shape, int n_threads);

/// The caches of a model in such a context.
struct CacheLayout {
  ModelShape shape;  // layers without a cache of their own have no KV heads
  struct Layer {
    int64_t cells_per_stream = 0;
    bool is_window = false;
  };
  std::vector<Layer> layers;  // in the order of shape.layers
  int n_streams = 1;
  HostDevice device = {"CPU", ""};
  int context_length = 0;  // that the model was trained for; 0 where its file does not say

  int64_t cells(int layer) const { return layers[layer].cells_per_stream * n_streams; }
  /// A layout in which all layers have `n_cells` cells and none has a sliding window.
  static CacheLayout plain(const ModelShape& shape, int64_t n_cells);
};

/// The caches as llama.cpp lays them out; neither loads the model nor allocates a cache. Throws std::runtime_error
/// where the file is no model or llama.cpp cannot make such a context of it.
CacheLayout read_layout(const std::string& model, const ContextShape& shape);

/// The plans of all layers that have a cache, as the plugin makes them on the layout's device. Throws as CachePlanner
/// does.
std::vector<LayerPlan> plan_layers(const Settings& settings, const CacheLayout& layout);
PlanTotals plan_totals(const Settings& settings, const CacheLayout& layout);

}  // namespace thimble
