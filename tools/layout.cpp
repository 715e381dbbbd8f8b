#include "layout.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "calibrate/model_file.h"
#include "model.h"

namespace thimble {
namespace {

/// Reads the layout from llama.cpp's log while it makes a context: nothing else names the layers of each cache. Puts
/// the log's former function back when it ends.
class LayoutLog {
public:
  explicit LayoutLog(CacheLayout& layout) : layout_(layout) {
    llama_log_get(&before_, &before_data_);
    llama_log_set([](ggml_log_level, const char* text, void* self) { static_cast<LayoutLog*>(self)->read(text); },
                  this);
  }
  ~LayoutLog() { llama_log_set(before_, before_data_); }
  LayoutLog(const LayoutLog&) = delete;
  LayoutLog& operator=(const LayoutLog&) = delete;

  int n_layers() const { return n_layers_; }
  /// Gives the cells of the context to the layers whose cache's number of cells was not logged.
  void set_cells(int64_t cells_per_stream) {
    for (int layer : of_whole_context_) layout_.layers[layer].cells_per_stream = cells_per_stream;
  }

private:
  void read(const char* text) {
    unsigned cells = 0;
    int layer = 0, parsed = 0;
    if (std::sscanf(text, "llama_kv_cache_iswa: creating non-SWA KV cache, size = %u", &cells) == 1) {
      cells_ = cells, is_window_ = false;
    } else if (std::sscanf(text, "llama_kv_cache_iswa: creating SWA KV cache, size = %u", &cells) == 1) {
      cells_ = cells, is_window_ = true;
    } else if (std::sscanf(text, "llama_kv_cache: layer %d: dev =%n", &layer, &parsed) == 1 && parsed > 0 &&
               size_t(layer) < layout_.layers.size()) {
      layout_.layers[layer] = {cells_, is_window_};
      if (cells_ == 0) of_whole_context_.push_back(layer);
      n_layers_++;
    }
  }

  CacheLayout& layout_;
  ggml_log_callback before_ = nullptr;
  void* before_data_ = nullptr;
  int64_t cells_ = 0;  // of the cache whose layers are being logged; 0 where its cells were not logged
  bool is_window_ = false;
  int n_layers_ = 0;
  std::vector<int> of_whole_context_;
};

}  // namespace

llama_context_params context_params(const ContextShape& shape, int n_threads) {
  llama_context_params params = llama_context_default_params();
  const int n_cells = (shape.n_cells + 255) / 256 * 256;
  params.n_ctx = uint32_t(n_cells) * uint32_t(shape.unified ? 1 : shape.n_sequences);
  params.n_batch = uint32_t(shape.n_batch);
  params.n_ubatch = uint32_t(shape.n_ubatch);
  params.n_seq_max = uint32_t(shape.n_sequences);
  params.kv_unified = shape.unified;
  params.swa_full = false;
  params.n_threads = params.n_threads_batch = n_threads;
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
  return params;
}

CacheLayout CacheLayout::plain(const ModelShape& shape, int64_t n_cells) {
  CacheLayout layout;
  layout.shape = shape;
  layout.layers.assign(shape.layers.size(), {n_cells, false});
  return layout;
}

CacheLayout read_layout(const std::string& path, const ContextShape& shape) {
  const ModelFile file(path);
  CacheLayout layout;
  layout.shape.architecture = file.architecture();
  layout.layers.resize(file.n_layers());
  layout.n_streams = shape.unified ? 1 : shape.n_sequences;
  layout.device = shape.device;
  layout.context_length = file.context_length();
  llama_model_params params = llama_model_default_params();
  ggml_backend_dev_t none = nullptr;
  params.devices = &none;
  params.n_gpu_layers = 0;
  params.no_alloc = true;  // the cache is not allocated, either
  params.load_mode = LLAMA_LOAD_MODE_NONE;
  {
    LayoutLog log(layout);
    const ModelPtr model(llama_model_load_from_file(path.c_str(), params));
    if (!model) throw std::runtime_error("llama.cpp cannot read the model " + path);
    const ContextPtr context(llama_init_from_model(model.get(), context_params(shape, 1)));
    if (!context) {
      throw std::runtime_error("llama.cpp makes no context of " + std::to_string(shape.n_cells) + " cells for " + path);
    }
    log.set_cells(llama_n_ctx_seq(context.get()));
    if (log.n_layers() == 0) throw std::runtime_error(path + " has no KV cache that its log tells of");
  }
  for (int i = 0; i < file.n_layers(); i++) {
    const bool has_cache = layout.layers[i].cells_per_stream > 0;
    layout.shape.layers.push_back(has_cache ? file.layer(i, layout.layers[i].is_window) : LayerShape{});
  }
  return layout;
}

std::vector<LayerPlan> plan_layers(const Settings& settings, const CacheLayout& layout) {
  const std::unique_ptr<Engine> engine = make_engine(layout.device);
  if (!engine) throw std::runtime_error("this build of Thimble has no engine for " + layout.device.backend);
  const CachePlanner planner(*engine, settings);
  std::vector<LayerPlan> plans;
  for (size_t i = 0; i < layout.layers.size(); i++) {
    const LayerShape& layer = layout.shape.layers[i];
    if (layer.n_kv_heads == 0) continue;
    LayerGeometry geometry;
    geometry.layer = int(i);
    geometry.n_kv_heads = layer.n_kv_heads;
    geometry.cells_per_stream = layout.layers[i].cells_per_stream;
    geometry.n_streams = layout.n_streams;
    geometry.is_window = layout.layers[i].is_window;
    for (Kind kind : {Kind::key, Kind::value}) {
      geometry.head_dim[int(kind)] = layer.dim(kind);
      geometry.width[int(kind)] = int64_t(layer.dim(kind)) * layer.n_kv_heads;
    }
    plans.push_back(planner.plan(geometry));
  }
  return plans;
}

PlanTotals plan_totals(const Settings& settings, const CacheLayout& layout) {
  PlanTotals totals;
  for (const LayerPlan& plan : plan_layers(settings, layout)) totals.add(plan);
  return totals;
}

}  // namespace thimble
