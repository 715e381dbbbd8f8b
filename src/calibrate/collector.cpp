#include "calibrate/collector.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "cache/pool.h"
#include "cache/window.h"
#include "codec/half.h"

namespace thimble {
namespace {

constexpr int kLastQueries = 32;  // of a prompt, as TailorKV takes them
constexpr size_t kMostWaiting = 64;

/// Of the cells that a run's last token sees, those that the cache keeps exact as its pool: [n_cells of `cached`].
std::vector<bool> pool_of(const Run& run, const LayerShape& shape, const float* queries, int n_tokens_of_batch,
                          const CachedKeys& cached) {
  const WindowSize window;
  std::vector<bool> in_pool(cached.n_cells, false);
  const std::vector<int> cells = cached.seen_by(run.first_token + run.n_tokens - 1);
  const size_t row = size_t(shape.n_kv_heads) * shape.key_dim;
  std::vector<uint16_t> halves;
  std::vector<const uint16_t*> keys;
  halves.reserve(cells.size() * row);
  for (int cell : cells) {
    keys.push_back(halves.data() + halves.size());
    for (int h = 0; h < shape.n_kv_heads; h++) {
      const float* key = cached.keys + (size_t(h) * cached.n_cells + cell) * shape.key_dim;
      for (int d = 0; d < shape.key_dim; d++) halves.push_back(float_to_half(key[d]));
    }
  }
  const BatchQueries all{queries,
                         shape.n_heads,
                         shape.key_dim,
                         n_tokens_of_batch,
                         size_t(shape.n_heads) * shape.key_dim,
                         size_t(shape.key_dim),
                         0};
  std::vector<int> rows(run.n_tokens);
  std::iota(rows.begin(), rows.end(), run.first_token);
  const size_t n_recent = std::min(keys.size(), size_t(window.last)), n_others = keys.size() - n_recent;
  std::vector<float> scores(n_others);
  const std::span<const uint16_t*const> others(keys.data(), n_others), recent(keys.data() + n_others, n_recent);
  score_cells(mean_query(all, rows), shape.n_heads, shape.n_kv_heads, shape.key_dim, others, recent, scores);
  std::vector<size_t> best(n_others);
  std::iota(best.begin(), best.end(), size_t{0});
  const size_t n_pool = std::min(n_others, size_t(window.pool));
  std::partial_sort(best.begin(), best.begin() + ptrdiff_t(n_pool), best.end(),
                    [&](size_t a, size_t b) { return scores[a] > scores[b]; });
  for (size_t i = 0; i < n_pool; i++) in_pool[cells[best[i]]] = true;
  return in_pool;
}

}  // namespace

Collector::Measured::Layer& Collector::Measured::of(int layer) {
  if (layers.size() <= size_t(layer)) layers.resize(size_t(layer) + 1);
  return layers[layer];
}

void Collector::begin(std::vector<Run> runs) {
  for (size_t i = 0; i < runs_.size(); i++) {
    if (runs_[i].ends == Run::Ends::yes) count(measured_[i]);
    if (runs_[i].ends == Run::Ends::unknown) waiting_.push_back(std::move(measured_[i]));
  }
  runs_ = std::move(runs);
  measured_.assign(runs_.size(), {});
  for (size_t i = 0; i < runs_.size(); i++) {
    if (!runs_[i].cells.empty()) measured_[i].last_cell = runs_[i].cells.back();
  }
  // What waits counts where its sequence does not go on with more of a prompt, or will not: its last cell is written
  // anew.
  std::erase_if(waiting_, [&](const Measured& earlier) {
    for (const Run& run : runs_) {
      if (run.previous_cell != earlier.last_cell) continue;
      if (!may_end(run)) count(earlier);
      return true;
    }
    const bool is_overwritten = std::any_of(runs_.begin(), runs_.end(), [&](const Run& run) {
      return std::find(run.cells.begin(), run.cells.end(), earlier.last_cell) != run.cells.end();
    });
    if (is_overwritten || runs_.empty()) count(earlier);
    return is_overwritten || runs_.empty();
  });
  while (waiting_.size() > kMostWaiting) {
    count(waiting_.front());
    waiting_.erase(waiting_.begin());
  }
}

bool Collector::may_end() const {
  return std::any_of(runs_.begin(), runs_.end(), [](const Run& run) { return may_end(run); });
}

void Collector::add(int layer, const LayerBatch& batch) {
  if (layers_.size() <= size_t(layer)) layers_.resize(size_t(layer) + 1);
  if (!layers_[layer]) {
    layers_[layer].emplace(batch.shape, batch.rope, batch.score_scale, options_, layer);
    layers_[layer]->set_norms(batch.query_norm, batch.key_norm);
  }
  if (rope_shape_ == RopeShape{}) rope_shape_ = batch.rope_shape;
  const LayerShape& shape = batch.shape;
  for (const Run& run : runs_) {
    const size_t first = run.first_token;
    layers_[layer]->add({run.first_position, run.n_tokens, batch.keys + first * shape.n_kv_heads * shape.key_dim,
                         batch.values + first * shape.n_kv_heads * shape.value_dim,
                         batch.queries + first * shape.n_heads * shape.key_dim, run.text_kind});
  }
}

void Collector::add_attention(int layer, size_t run_index, const float* queries, const CachedKeys& cached) {
  const Run& run = runs_[run_index];
  if (run.text_kind == options_.left_out_kind) return;
  const LayerShape& shape = layers_.at(layer)->shape();
  const float scale = layers_[layer]->score_scale();
  const int group = shape.n_heads / shape.n_kv_heads;
  int n_tokens = 0;  // of the batch
  for (const Run& r : runs_) n_tokens = std::max(n_tokens, r.first_token + r.n_tokens);
  const std::vector<bool> is_pool = pool_of(run, shape, queries, n_tokens, cached);
  for (int t = std::max(0, run.n_tokens - kLastQueries); t < run.n_tokens; t++) {
    const std::vector<int> cells = cached.seen_by(run.first_token + t);
    std::vector<bool> in_pool;
    for (int cell : cells) in_pool.push_back(is_pool[cell]);
    for (int h = 0; h < shape.n_heads; h++) {
      using Row = Eigen::Map<const Eigen::VectorXf>;
      const Row query(queries + (size_t(run.first_token + t) * shape.n_heads + h) * shape.key_dim, shape.key_dim);
      std::vector<float> weights(cells.size());
      float greatest = -INFINITY;
      for (size_t i = 0; i < cells.size(); i++) {
        const Row key(cached.keys + (size_t(h / group) * cached.n_cells + cells[i]) * shape.key_dim, shape.key_dim);
        weights[i] = scale * query.dot(key);
        greatest = std::max(greatest, weights[i]);
      }
      for (float& w : weights) w = std::exp(w - greatest);
      if (const auto shares = shares_of(std::move(weights), in_pool)) {
        measured_[run_index].of(layer).attention.push_back({h / group, *shares});
      }
    }
  }
}

void Collector::add_power(int layer, Power what, const std::vector<double>& squares, int n_tokens_of_batch) {
  if (!has(layer)) return;
  const bool by_token = squares.size() == size_t(n_tokens_of_batch);
  for (size_t i = 0; i < runs_.size(); i++) {
    if (!may_end(runs_[i]) || runs_[i].text_kind == options_.left_out_kind) continue;
    std::vector<double>& into = measured_[i].of(layer).power[int(what)];
    const size_t first = by_token ? runs_[i].first_token : 0, n = by_token ? runs_[i].n_tokens : squares.size();
    into.insert(into.end(), squares.begin() + first, squares.begin() + first + n);
    if (!by_token) return;  // any run will do
  }
}

void Collector::count(const Measured& measured) {
  for (size_t i = 0; i < measured.layers.size(); i++) {
    if (!has(int(i))) continue;
    LayerStatistics& layer = *layers_[i];
    for (const auto& [kv_head, shares] : measured.layers[i].attention) {
      layer.add_attention(kv_head, shares);
    }
    const auto& power = measured.layers[i].power;
    for (double square : power[int(Power::residual)]) layer.add_residual(square);
    for (double square : power[int(Power::output)]) layer.add_output(square);
    for (double square : power[int(Power::normalized)]) layer.add_normalized(square);
  }
}

ModelShape Collector::shape(int n_layers) const {
  ModelShape shape;
  for (int i = 0; i < n_layers; i++) shape.layers.push_back(has(i) ? shape_of(i) : LayerShape{});
  shape.rope = rope_shape_;
  return shape;
}

std::vector<LayerStatistics> Collector::take_layers(int n_layers) {
  std::vector<LayerStatistics> layers;
  layers_.resize(n_layers);
  for (auto& layer : layers_) {
    layers.push_back(layer ? std::move(*layer) : LayerStatistics(LayerShape{}, {}, 1.0f, options_, 0));
  }
  return layers;
}

}  // namespace thimble
