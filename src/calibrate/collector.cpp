#include "calibrate/collector.h"

#include <ggml-backend.h>
#include <ggml.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <utility>

#include "cache/cache_name.h"

namespace thimble {
namespace {

/// The name of the cache tensor that `t` is or is a view of.
std::optional<CacheName> cache_behind(const ggml_tensor* t) {
  while (t->view_src) t = t->view_src;
  return parse_cache_name(t->name);
}

float number(const uint8_t* at, ggml_type type) {
  if (type == GGML_TYPE_F32) {
    float value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  ggml_fp16_t half;
  std::memcpy(&half, at, sizeof half);
  return ggml_fp16_to_fp32(half);
}

/// A tensor as floats, [ne2][ne1][ne0], whatever its strides and wherever it lies.
std::vector<float> fetch(const ggml_tensor* t) {
  if (t->type != GGML_TYPE_F32 && t->type != GGML_TYPE_F16) {
    throw std::runtime_error("the model's keys and values are neither f32 nor f16: use cache type f16");
  }
  std::vector<uint8_t> bytes(ggml_nbytes(t));
  ggml_backend_tensor_get(t, bytes.data(), 0, bytes.size());
  std::vector<float> out;
  out.reserve(ggml_nelements(t));
  for (int64_t k = 0; k < t->ne[2]; k++) {
    for (int64_t j = 0; j < t->ne[1]; j++) {
      for (int64_t i = 0; i < t->ne[0]; i++) {
        out.push_back(number(&bytes[i * t->nb[0] + j * t->nb[1] + k * t->nb[2]], t->type));
      }
    }
  }
  return out;
}

/// The ROPE node that these keys come from, or null where they are not rotated.
const ggml_tensor* rope_behind(const ggml_tensor* t) {
  for (int depth = 0; t && depth < 12; depth++, t = t->src[0]) {
    if (t->op == GGML_OP_ROPE) return t;
  }
  return nullptr;
}

/// Reads the angles of a ROPE node as ggml computes them (ggml_rope_ext: base, linear and YaRN scaling, factors).
/// YaRN's magnitude scaling is left out: the keys have it already, and a further rotation must not repeat it.
Rope rope_of(const ggml_tensor* node, RopeShape& shape) {
  int32_t ints[5];
  float floats[6];  // base, scale, and YaRN's mix, magnitude, beta fast, beta slow
  std::memcpy(ints, node->op_params, sizeof ints);
  std::memcpy(floats, node->op_params + 5, sizeof floats);
  const int n_dims = ints[1], mode = ints[2];
  shape = {mode, n_dims, floats[0], floats[1]};

  std::vector<float> factors(size_t(n_dims) / 2, 1.0f);
  if (node->src[2]) ggml_backend_tensor_get(node->src[2], factors.data(), 0, factors.size() * sizeof(float));
  float ramp[2];
  ggml_rope_yarn_corr_dims(n_dims, ints[4], floats[0], floats[4], floats[5], ramp);

  Rope rope;
  // In a text, all sections of M-RoPE have the same position, so it rotates as NeoX's RoPE does.
  rope.neighbours = mode == GGML_ROPE_TYPE_NORMAL;
  for (int i = 0; i < n_dims / 2; i++) {
    const double full = std::pow(double(floats[0]), -2.0 * i / n_dims) / factors[i];
    const double along = std::clamp((i - ramp[0]) / std::max(0.001f, ramp[1] - ramp[0]), 0.0f, 1.0f);
    const double mix = (1.0 - along) * floats[2];
    rope.frequencies.push_back(full * (floats[1] * (1.0 - mix) + mix));
  }
  return rope;
}

/// The product of a layer's output projection with its heads' outputs, or -1.
int layer_of_output(const ggml_tensor* node) {
  int layer = -1, parsed = 0;
  if (node->op != GGML_OP_MUL_MAT) return -1;
  return std::sscanf(node->src[0]->name, "blk.%d.attn_output.weight%n", &layer, &parsed) == 1 && parsed > 0 ? layer
                                                                                                            : -1;
}

/// What is measured of a node, as llama.cpp names them, and the layer that it belongs to; null where nothing is.
std::pair<int, void (LayerStatistics::*)(double)> measured(const ggml_tensor* node) {
  int layer = -1;
  if (std::sscanf(node->name, "l_out-%d", &layer) == 1 && layer >= 0) return {layer, &LayerStatistics::add_residual};
  if ((layer = layer_of_output(node)) >= 0) return {layer, &LayerStatistics::add_output};
  if (std::sscanf(node->name, "attn_post_norm-%d", &layer) == 1 && layer >= 0 && node->op == GGML_OP_MUL &&
      node->src[0]->op == GGML_OP_RMS_NORM) {
    // Some models name so the norm of the residual stream: then no projection lies behind it.
    const ggml_tensor* x = node->src[0]->src[0];
    while (x->op == GGML_OP_GET_ROWS || x->op == GGML_OP_RESHAPE || x->op == GGML_OP_VIEW) x = x->src[0];
    if (layer_of_output(x) == layer) return {layer, &LayerStatistics::add_normalized};
  }
  return {-1, nullptr};
}

}  // namespace

Collector::Collector(int n_layers, const StatisticsOptions& options) : options_(options), layers_(n_layers) {}

bool Collector::callback(ggml_tensor* node, bool ask, void* user_data) {
  Collector& self = *static_cast<Collector*>(user_data);
  if (!self.error_.empty()) return !ask;
  if (const auto [layer, add] = measured(node); add && size_t(layer) < self.layers_.size()) {
    if (ask) return self.last_;
    if (self.last_) self.measure(node, layer, add);
    return true;
  }
  const bool stores = node->op == GGML_OP_SET_ROWS, attends = node->op == GGML_OP_FLASH_ATTN_EXT;
  if (!stores && !attends) return !ask;
  const auto cache = cache_behind(stores ? node : node->src[1]);
  if (!cache || size_t(cache->layer) >= self.layers_.size()) return !ask;
  if (ask) return true;
  try {
    if (stores) {
      self.stored(node, cache->layer, cache->kind);
    } else {
      self.attended(node, cache->layer);
    }
  } catch (const std::exception& e) {
    self.error_ = e.what();
    return false;
  }
  return true;
}

void Collector::check() const {
  if (!error_.empty()) throw std::runtime_error(error_);
}

void Collector::stored(const ggml_tensor* node, int layer, Kind kind) {
  Pending& pending = pending_[layer];
  Rows& rows = kind == Kind::key ? pending.keys : pending.values;
  rows = {fetch(node->src[0]), int(node->src[0]->ne[1])};
  if (kind == Kind::value) return;
  if (const ggml_tensor* rope = rope_behind(node->src[0])) {
    pending.rope = rope_of(rope, pending.rope_shape);
    if (rope_shape_ == RopeShape{}) rope_shape_ = pending.rope_shape;
  }
}

void Collector::measure(const ggml_tensor* node, int layer, void (LayerStatistics::*add)(double)) {
  // llama.cpp computes the last layer's output for the last token only, which is enough here.
  if (!layers_[layer] || node->type != GGML_TYPE_F32 || !ggml_is_contiguous(node)) return;
  const std::vector<float> x = fetch(node);
  for (int64_t t = 0; t < node->ne[1]; t++) {
    double square = 0;
    for (int64_t i = 0; i < node->ne[0]; i++) square += std::pow(double(x[t * node->ne[0] + i]), 2);
    ((*layers_[layer]).*add)(square);
  }
}

void Collector::attended(const ggml_tensor* node, int layer) {
  const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2];
  const int n_tokens = int(q->ne[1]);
  const LayerShape shape = {int(k->ne[2]), int(q->ne[2]), int(k->ne[0]), int(v->ne[0])};
  const auto found = pending_.find(layer);
  if (found == pending_.end()) return;  // this layer reads another layer's cache
  Pending& pending = found->second;
  if (pending.keys.values.size() != size_t(n_tokens) * shape.n_kv_heads * shape.key_dim ||
      pending.values.values.size() != size_t(n_tokens) * shape.n_kv_heads * shape.value_dim) {
    throw std::runtime_error("layer " + std::to_string(layer) +
                             " keeps its keys or values in a way that calibration "
                             "does not know: run with flash attention");
  }
  float scale;
  std::memcpy(&scale, node->op_params, sizeof scale);
  if (!layers_[layer]) layers_[layer].emplace(shape, pending.rope, scale, options_, layer);

  const std::vector<float> by_head = fetch(q);  // [n_heads][n_tokens][key_dim]
  std::vector<float> queries(by_head.size());
  for (int h = 0; h < shape.n_heads; h++) {
    for (int t = 0; t < n_tokens; t++) {
      std::copy_n(&by_head[(size_t(h) * n_tokens + t) * shape.key_dim], shape.key_dim,
                  &queries[(size_t(t) * shape.n_heads + h) * shape.key_dim]);
    }
  }
  layers_[layer]->add(
      {first_position_, n_tokens, pending.keys.values.data(), pending.values.values.data(), queries.data()});
  if (last_) {
    // The attention weights of the last 32 queries over the cache's keys. Here a sequence starts at cell 0.
    const std::vector<float> keys = fetch(k);  // [n_kv_heads][n_cells][key_dim]
    const int n_cells = int(k->ne[1]), group = shape.n_heads / shape.n_kv_heads;
    for (int t = std::max(0, n_tokens - 32); t < n_tokens; t++) {
      const int n = first_position_ + t + 1;
      for (int h = 0; h < shape.n_heads; h++) {
        using Row = Eigen::Map<const Eigen::VectorXf>;
        const Row query(&queries[(size_t(t) * shape.n_heads + h) * shape.key_dim], shape.key_dim);
        std::vector<float> weights(n);
        float greatest = -INFINITY;
        for (int i = 0; i < n; i++) {
          const Row key(&keys[(size_t(h / group) * n_cells + i) * shape.key_dim], shape.key_dim);
          weights[i] = scale * query.dot(key);
          greatest = std::max(greatest, weights[i]);
        }
        for (float& w : weights) w = std::exp(w - greatest);
        layers_[layer]->add_attention(h / group, std::move(weights));
      }
    }
  }
  pending_.erase(found);
}

ModelShape Collector::shape() const {
  ModelShape shape;
  for (const auto& layer : layers_) shape.layers.push_back(layer ? layer->shape() : LayerShape{});
  shape.rope = rope_shape_;
  return shape;
}

std::vector<LayerStatistics> Collector::take_layers() {
  std::vector<LayerStatistics> layers;
  for (auto& layer : layers_) {
    layers.push_back(layer ? std::move(*layer) : LayerStatistics(LayerShape{}, {}, 1.0f, options_, 0));
  }
  return layers;
}

}  // namespace thimble
