#include "plugin/calibration.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>

#include "calibrate/fit.h"
#include "calibrate/model_file.h"
#include "calibrate/output_metrics.h"
#include "plugin/ggml_api.h"
#include "plugin/kv_buffer.h"
#include "plugin/model_profile.h"
#include "plugin/report.h"

namespace thimble {
namespace {

// At most so much memory for keys and values, as `thimble calibrate` has by default.
constexpr double kSampleBytes = 2e9;
constexpr size_t kFewestSamples = 1024;
constexpr size_t kFewTokens = 8192;  // too few for a good profile

// Paths that calibrations of this process write to. A server may have more than one context, such as a draft model's.
std::mutex paths_mutex;
std::set<std::string>& paths() {
  static std::set<std::string> all;
  return all;
}

/// The model's file, if the process was started with one whose layers have the caches' sizes.
std::string file_of_model(const std::vector<KvBuffer*>& caches) {
  std::string path = model_of(arguments_of_this_process());
  if (path.empty()) return {};
  try {
    const ModelFile file(path);
    for (const KvBuffer* buffer : caches) {
      for (const auto& [layer, geometry] : buffer->caches()) {
        const LayerShape shape = file.layer(layer, geometry.is_window);
        if (layer >= file.n_layers() || shape.n_kv_heads * shape.key_dim != geometry.width[int(Kind::key)]) return {};
      }
    }
    return path;
  } catch (const std::runtime_error&) {
    return {};  // a split model or the like: the defaults serve
  }
}

/// The first node that rotates something by the tokens' positions, or null. (A context shift rotates cells by other
/// numbers, in graphs of its own.)
const ggml_tensor* find_rope(ggml_cgraph* graph) {
  for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
    const ggml_tensor* node = ggml_graph_node(graph, i);
    if (node->op == GGML_OP_ROPE && node->src[1] && node->src[1]->type == GGML_TYPE_I32) return node;
  }
  return nullptr;
}

/// The context length that the model was trained for, as RoPE's nodes have it.
int context_of(const ggml_tensor* rope) {
  return rope ? rope->op_params[4] : 0;
}

/// Whether a tensor's bytes are as a file has them. Those of repacked weights are not.
bool is_plain(const ggml_tensor* tensor) {
  ggml_backend_buffer_t buffer = root_of(tensor)->buffer;
  if (!buffer) return false;
  return ggml_backend_buffer_is_host(buffer) ||
         (buffer->buft->device && buffer->buft == ggml_backend_dev_buffer_type(buffer->buft->device));
}

}  // namespace

std::string calibration_problem(const Settings& settings) {
  namespace fs = std::filesystem;
  const fs::path path = settings.calibrate.path;
  const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  std::error_code error;
  if (!fs::is_directory(folder, error) || access(folder.c_str(), W_OK) != 0) {
    return "calibrate=" + path.string() + ": the folder is not there, or cannot be written to";
  }
  if (fs::is_directory(path, error)) return "calibrate=" + path.string() + " is a folder: it must name a file";
  return {};
}

Calibration::Calibration(const Settings& settings, const std::vector<KvBuffer*>& caches, ggml_cgraph* graph)
    : settings_(settings.calibrate) {
  {
    const std::lock_guard lock(paths_mutex);
    has_path_ = paths().insert(settings_.path).second;
  }
  if (!has_path_) {
    give_up("another context of this process writes there, so this one is not looked at");
    return;
  }
  std::set<int> layers;
  double token_bytes = 0;
  int64_t n_cells = 0;
  for (size_t i = 0; i < caches.size(); i++) {
    for (const auto& [layer, geometry] : caches[i]->caches()) {
      layers.insert(layer);
      if (budgets_.size() <= size_t(layer)) budgets_.resize(size_t(layer) + 1, 0);
      budgets_[layer] = int(i);
      token_bytes += double(geometry.width[0] + geometry.width[1]) * sizeof(uint16_t);
      n_cells = std::max(n_cells, geometry.cells_per_stream);
    }
  }
  std::string why = layers_elsewhere(layers);
  if (caches.front()->device().others_have_caches()) {
    why = "the model's layers are on several devices: put them on one (--device THIMBLE0)";
  }
  if (!why.empty()) {
    give_up(why);
    return;
  }
  n_layers_ = int(budgets_.size());
  statistics_.context = settings_.context > 0 ? settings_.context : context_of(find_rope(graph));
  model_ = file_of_model(caches);
  if (!model_.empty()) {
    const ModelFile file(model_);
    architecture_ = file.architecture();
    n_layers_ = file.n_layers();
    budgets_.resize(n_layers_, 0);
    if (settings_.context == 0 && file.context_length() > 0) statistics_.context = file.context_length();
  }
  if (statistics_.context <= 0) statistics_.context = int(n_cells);
  statistics_.n_tokens = size_t(settings_.tokens);
  statistics_.max_samples = std::max(kFewestSamples, size_t(kSampleBytes / token_bytes));
  collector_ = std::make_unique<Collector>(statistics_);
  reader_ = std::make_unique<GraphReader>(*collector_, n_layers_);
  is_reading_ = true;
}

Calibration::~Calibration() {
  if (!has_path_) return;
  const std::lock_guard lock(paths_mutex);
  paths().erase(settings_.path);
}

void Calibration::give_up(const std::string& why) {
  is_reading_ = false;
  reader_.reset();
  collector_.reset();
  GGML_LOG_ERROR("thimble: calibrate=%s: no profile will be written: %s\n", settings_.path.c_str(), why.c_str());
}

void Calibration::read(const ggml_tensor* node) {
  reader_->read(node);
  const int layer = layer_of_output(node);
  if (layer < 0 || !collector_->has(layer) || value_metrics_.count(layer)) return;
  std::vector<Eigen::MatrixXd>& metric = value_metrics_[layer];
  const ggml_tensor* wo = node->src[0];
  if (!is_plain(wo)) return;
  std::vector<char> bytes(ggml_nbytes(wo));
  ggml_backend_tensor_get(wo, bytes.data(), 0, bytes.size());
  metric = output_metric(wo, bytes.data(), collector_->shape_of(layer));
}

ggml_status Calibration::compute(ggml_backend_t inner, ggml_cgraph* graph) {
  const auto run = [&](int first, int last) {
    if (first == last) return GGML_STATUS_SUCCESS;
    ggml_cgraph part = part_of(*graph, ggml_graph_nodes(graph) + first, last - first);
    return ggml_backend_graph_compute(inner, &part);
  };
  const int n_nodes = ggml_graph_n_nodes(graph);
  int begin = 0;
  reader_->begin(find_rope(graph));
  for (int i = 0; i < n_nodes && is_reading_; i++) {
    const ggml_tensor* node = ggml_graph_node(graph, i);
    if ((node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0 || !reader_->wants(node)) continue;
    const ggml_status status = run(begin, i + 1);
    if (status != GGML_STATUS_SUCCESS) return status;
    begin = i + 1;
    try {
      read(node);
    } catch (const std::exception& error) {
      give_up(error.what());
    }
  }
  if (is_reading_ && reader_->n_tokens() >= size_t(settings_.tokens)) {
    is_reading_ = false;
    GGML_LOG_WARN("thimble: calibrate=%s: %zu tokens are read; the profile is written when the context ends\n",
                  settings_.path.c_str(), reader_->n_tokens());
  }
  return run(begin, n_nodes);
}

void Calibration::finish() noexcept {
  if (!collector_) return;
  try {
    fit();
  } catch (const std::exception& error) {
    GGML_LOG_ERROR("thimble: calibrate=%s: no profile was written: %s\n", settings_.path.c_str(), error.what());
  }
  collector_.reset();
}

void Calibration::fit() {
  const size_t n_tokens = reader_->n_tokens();
  if (n_tokens == 0) throw std::runtime_error("the program ran no tokens");
  const auto start = std::chrono::steady_clock::now();
  GGML_LOG_WARN("thimble: calibrate=%s: fitting a profile to %zu tokens, which takes up to a few minutes\n",
                settings_.path.c_str(), n_tokens);
  collector_->end();
  ModelShape shape = collector_->shape(n_layers_);
  shape.architecture = architecture_;
  const std::vector<LayerStatistics> layers = collector_->take_layers(n_layers_);

  std::string notes;
  std::vector<std::vector<Eigen::MatrixXd>> metrics(n_layers_), in_file;
  bool has_metrics = true, has_attention = true;
  for (int i = 0; i < n_layers_; i++) {
    metrics[i] = value_metrics_[i];
    if (metrics[i].empty() && shape.layers[i].n_kv_heads > 0 && !model_.empty()) {
      if (in_file.empty()) in_file = read_output_metrics(model_, shape);
      metrics[i] = in_file[i];
    }
    metrics[i].resize(shape.layers[i].n_kv_heads);
    for (int h = 0; h < shape.layers[i].n_kv_heads; h++) {
      has_metrics = has_metrics && metrics[i][h].size() > 0;
      has_attention = has_attention && layers[i].concentration(h) > 0;
    }
  }
  if (!has_metrics) {
    notes +=
        "; weights of the attention's output could not be read (they can with -m, or with --no-repack), so errors "
        "of values count alike";
  }
  FitOptions options;
  options.bits = settings_.rates;
  options.uneven = !settings_.even && has_attention;
  options.budgets = budgets_;
  options.n_threads = int(std::max(1u, std::thread::hardware_concurrency()));
  if (!settings_.even && !has_attention) {
    notes += "; no prompt was long enough to tell which layers need more bits, so all have the same rate";
  }
  if (n_tokens < kFewTokens) notes += "; that is few: 25,000 tokens make a better profile";

  Profile profile = fit_profile(shape, layers, metrics, options, [](double) {});
  const std::vector<std::string> arguments = arguments_of_this_process();
  const std::string program = arguments.empty() ? "" : std::filesystem::path(arguments[0]).filename().string();
  profile.source = program + ", " + std::to_string(n_tokens) + " tokens, seed " + std::to_string(options.seed) +
                   ", positions to " + std::to_string(statistics_.context);
  write_profile(profile, settings_.path);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  GGML_LOG_WARN("thimble: calibrate=%s: written, %.1f MB (%s), fitted in %.0f s%s\n", settings_.path.c_str(),
                double(std::filesystem::file_size(settings_.path)) / 1e6, profile.source.c_str(), seconds,
                notes.c_str());
}

Calibration* calibration_of(Device& device, ggml_cgraph* graph) {
  if (!device.calibrates()) return nullptr;
  std::set<ggml_backend_buffer_t> written;
  for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
    const ggml_tensor* node = ggml_graph_node(graph, i);
    if (node->op == GGML_OP_SET_ROWS && parse_cache_name(root_of(node)->name)) written.insert(root_of(node)->buffer);
  }
  const std::vector<KvBuffer*> caches = device.calibrated(written);
  if (caches.empty()) return nullptr;
  std::shared_ptr<Calibration> calibration;
  for (const KvBuffer* buffer : caches) {
    if (!calibration) calibration = buffer->calibration();
  }
  if (!calibration) calibration = std::make_shared<Calibration>(caches.front()->planner().settings(), caches, graph);
  for (KvBuffer* buffer : caches) {
    buffer->join(calibration);
    buffer->use();
  }
  return calibration->is_reading() ? calibration.get() : nullptr;
}

}  // namespace thimble
