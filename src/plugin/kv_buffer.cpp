// Which tensors a buffer codes, and what it binds their layers to; state.cpp has what is saved, loaded and copied.
#include "plugin/kv_buffer.h"

#include <stdexcept>
#include <utility>

#include "ggml-impl.h"

namespace thimble {
namespace {

double mib(size_t bytes) {
  return double(bytes) / (1 << 20);
}

}  // namespace

const ggml_tensor* root_of(const ggml_tensor* tensor) {
  while (tensor->view_src) tensor = tensor->view_src;
  return tensor;
}

LayerGeometry geometry_of(const ggml_tensor* tensor, const CacheName& name) {
  LayerGeometry geometry;
  geometry.layer = name.layer;
  geometry.width[int(name.kind)] = tensor->ne[0];
  geometry.cells_per_stream = tensor->ne[1];
  geometry.n_streams = int(tensor->ne[2]);
  return geometry;
}

KvBuffer::~KvBuffer() {
  cache_.reset();
  ggml_backend_buffer_free(inner_);
}

ManagedLayer* KvBuffer::layer_of(const ggml_tensor* tensor, Kind* kind) {
  KvBuffer* buffer = of(tensor);
  if (!buffer) return nullptr;
  const auto it = buffer->by_tensor_.find(root_of(tensor));
  if (it == buffer->by_tensor_.end()) return nullptr;
  if (kind) *kind = it->second.kind;
  return &buffer->layers_.at(it->second.layer);
}

KvBuffer* buffer_of_cache(const ggml_tensor* node) {
  if (KvBuffer::layer_of(node)) return KvBuffer::of(node);
  for (const ggml_tensor* src : node->src) {
    if (src && KvBuffer::layer_of(src)) return KvBuffer::of(src);
  }
  return nullptr;
}

bool KvBuffer::add(ggml_tensor* tensor, const CacheName& name) {
  if (!planner_) planner_ = device_.planner();
  if (!planner_->why_f16(geometry_of(tensor, name)).empty()) return false;
  if (!cache_) cache_ = device_.engine().make_cache(planner_->settings(), planner_->hash());
  ManagedLayer& layer = layers_[name.layer];
  layer.index = name.layer;
  layer.tensors[int(name.kind)] = tensor;
  by_tensor_[tensor] = name;
  return true;
}

void KvBuffer::bind(ManagedLayer& layer, int key_dim, int value_dim, int n_kv_heads) {
  if (layer.plan) return;
  LayerGeometry geometry;
  for (Kind kind : {Kind::key, Kind::value}) {
    const int dim = kind == Kind::key ? key_dim : value_dim;
    const ggml_tensor* tensor = layer.tensors[int(kind)];
    if (!tensor || tensor->ne[0] != int64_t(dim) * n_kv_heads) {
      throw std::runtime_error(
          "layer " + std::to_string(layer.index) +
          ": this model's cache has no plain keys and values (MLA or the like), which Thimble cannot "
          "code; run it without the THIMBLE device (--device none, or thimble --kv f16)");
    }
    const int64_t other_width = geometry.width[1 - int(kind)];
    const int other_dim = geometry.head_dim[1 - int(kind)];
    geometry = geometry_of(tensor, {kind, layer.index});
    geometry.head_dim[int(kind)] = dim;
    geometry.width[1 - int(kind)] = other_width;
    geometry.head_dim[1 - int(kind)] = other_dim;
  }
  geometry.n_kv_heads = n_kv_heads;
  const LayerPlan plan = planner_->plan(geometry);
  uint8_t* const memory[2] = {memory_of(layer, plan, Kind::key), memory_of(layer, plan, Kind::value)};
  cache_->add_layer(plan, planner_->codecs(plan), memory);
  totals_.add(plan);
  layer.plan = plan;
}

// The tensor's memory, or more where it is too small for the true head size.
uint8_t* KvBuffer::memory_of(const ManagedLayer& layer, const LayerPlan& plan, Kind kind) {
  const ggml_tensor* tensor = layer.tensors[int(kind)];
  const LayerPlan reserved = planner_->plan(geometry_of(tensor, {kind, layer.index}));
  if (plan.bytes[int(kind)] <= reserved.bytes[int(kind)]) return static_cast<uint8_t*>(tensor->data);
  Buffer buffer(ggml_backend_buft_alloc_buffer(inner_->buft, plan.bytes[int(kind)]));
  if (!buffer) {
    throw std::runtime_error("layer " + std::to_string(layer.index) + ": no memory for its codes (" +
                             std::to_string(plan.bytes[int(kind)] >> 20) + " MiB): use a smaller context");
  }
  ggml_backend_buffer_clear(buffer.get(), 0);
  more_.push_back(std::move(buffer));
  return static_cast<uint8_t*>(ggml_backend_buffer_get_base(more_.back().get()));
}

void KvBuffer::use() {
  said_refusal_ = false;
  if (std::exchange(in_use_, true)) return;
  const Settings& settings = planner_->settings();
  GGML_LOG_INFO("thimble: KV cache of %d layers: %.2f MiB, %.2f MiB as f16; %s; %s kernels\n", totals_.n_coded,
                mib(totals_.coded_bytes), mib(totals_.coded_f16_bytes), settings.to_string().c_str(),
                device_.engine().kernels().c_str());
  if (totals_.store_bytes > 0) {
    GGML_LOG_INFO("thimble: exact store of %d layers: up to %.2f MiB in %s\n", totals_.n_retrieving,
                  mib(totals_.store_bytes), device_.engine().store_place(settings).c_str());
  }
}

}  // namespace thimble
