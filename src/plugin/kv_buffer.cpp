// Which tensors a buffer codes, and how it binds their layers. state.cpp saves, loads and copies cells.
#include "plugin/kv_buffer.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "ggml-impl.h"
#include "plugin/calibration.h"

namespace thimble {
const ggml_tensor* root_of(const ggml_tensor* tensor) {
  while (tensor->view_src) tensor = tensor->view_src;
  return tensor;
}

LayerGeometry geometry_of(Device& device, const ggml_tensor* tensor, const CacheName& name) {
  LayerGeometry geometry;
  geometry.layer = name.layer;
  geometry.width[int(name.kind)] = tensor->ne[0];
  geometry.cells_per_stream = tensor->ne[1];
  geometry.n_streams = int(tensor->ne[2]);
  geometry.is_window = device.is_window(tensor, name.layer);
  return geometry;
}

std::vector<RowPart> row_parts(const LayerPlan& plan, Kind kind) {
  const size_t keys = size_t(plan.side(Kind::key).head_dim), latent = size_t(plan.latent);
  if (latent == 0) return {{kind, 0, size_t(plan.side(kind).head_dim) * plan.shape.n_kv_heads}};
  return {{Kind::key, latent, keys}, {Kind::value, 0, latent}};
}

KvBuffer::~KvBuffer() {
  if (!caches_.empty()) device_.remove(*this);
  cache_.reset();
  ggml_backend_buffer_free(inner_);
  if (calibration_ && calibration_.use_count() == 1) calibration_->finish();
}

ManagedLayer* KvBuffer::layer_of(const ggml_tensor* tensor, Kind* kind) {
  KvBuffer* buffer = of(tensor);
  if (!buffer) return nullptr;
  const auto it = buffer->by_tensor_.find(buffer->cache_of(tensor));
  if (it == buffer->by_tensor_.end()) return nullptr;
  if (kind) *kind = it->second.kind;
  return &buffer->layers_.at(it->second.layer);
}

// The tensor by which this buffer knows the cache that a tensor lies in; any tensor where there is none.
const ggml_tensor* KvBuffer::cache_of(const ggml_tensor* tensor) const {
  const ggml_tensor* far = far_.find(tensor);
  return far ? far : root_of(tensor);
}

KvBuffer* buffer_of_cache(const ggml_tensor* node) {
  if (KvBuffer::layer_of(node)) return KvBuffer::of(node);
  for (const ggml_tensor* src : node->src) {
    if (src && KvBuffer::layer_of(src)) return KvBuffer::of(src);
  }
  return nullptr;
}

size_t bytes_in_buffer(const LayerPlan& plan, const ggml_tensor* tensor, Kind kind) {
  return tensor->type == GGML_TYPE_F16 ? plan.bytes[int(kind)] : std::max(plan.bytes[int(kind)], ggml_nbytes(tensor));
}

bool KvBuffer::add(ggml_tensor* tensor, const CacheName& name) {
  if (!planner_) planner_ = device_.planner();
  const LayerGeometry geometry = geometry_of(device_, tensor, name);
  if (caches_.empty()) device_.add(*this);
  LayerGeometry& cache = caches_.try_emplace(name.layer, geometry).first->second;
  cache.width[int(name.kind)] = tensor->ne[0];
  const LayerPlan plan = planner_->plan(geometry);
  const size_t bytes = plan.coded ? bytes_in_buffer(plan, tensor, name.kind) : ggml_nbytes(tensor);
  used_ += bytes;
  least_ = least_ == 0 ? bytes : std::min(least_, bytes);
  if (!plan.coded) return false;
  if (!cache_) cache_ = device_.engine().make_cache(planner_->settings());
  ManagedLayer& layer = layers_[name.layer];
  layer.index = name.layer;
  layer.tensors[int(name.kind)] = tensor;
  by_tensor_[tensor] = name;
  const int64_t row = planner_->row_of_profile(name.layer, name.kind);
  if (tensor->ne[0] < row && far_.empty()) {
    layer.parts[int(name.kind)] = place_part(device_, name, tensor->ne[0], row);
  }
  return true;
}

bool KvBuffer::add_of_other_type(ggml_tensor* tensor, ggml_tensor* view, const CacheName& name) {
  const auto make_f16 = [](ggml_tensor* t) {
    t->type = GGML_TYPE_F16;
    t->nb[0] = sizeof(uint16_t);
    for (int i = 1; i < GGML_MAX_DIMS; i++) t->nb[i] = t->nb[i - 1] * t->ne[i - 1];
  };
  const ggml_type type = tensor->type;
  if (type != GGML_TYPE_F16) {
    types_[name.layer] = type;
    if (!add(tensor, name)) return false;
    if (!std::exchange(told_of_type_, true)) {
      GGML_LOG_WARN(
          "thimble: cache type %s means %s here, since Thimble codes the cache itself. llama.cpp reserves memory for "
          "that "
          "type, of which only the codes take some; with --cache-type-k and --cache-type-v at f16 it reserves no "
          "more\n",
          ggml_type_name(type), planner_->settings().to_string().c_str());
    }
    stream_bytes_[tensor] = tensor->nb[2];
    make_f16(tensor);
  }
  view->view_offs = view->view_offs / stream_bytes_.at(tensor) * tensor->nb[2];
  view->data = static_cast<char*>(tensor->data) + view->view_offs;
  make_f16(view);
  return true;
}

bool KvBuffer::was_quantized(int layer) const {
  const auto type = types_.find(layer);
  return type != types_.end() && ggml_is_quantized(type->second);
}

void KvBuffer::bind(ManagedLayer& layer, int key_dim, int value_dim, int n_kv_heads, int group) {
  if (layer.plan) return;
  LayerGeometry geometry = caches_.at(layer.index);
  for (Kind kind : {Kind::key, Kind::value}) {
    const int dim = kind == Kind::key ? key_dim : value_dim;
    const ggml_tensor* tensor = layer.tensors[int(kind)];
    if (!tensor || tensor->ne[0] != int64_t(dim) * n_kv_heads) {
      throw std::runtime_error(
          "layer " + std::to_string(layer.index) +
          ": this model's cache has no plain keys and values (MLA or the like), which Thimble cannot "
          "code; run it without the THIMBLE device (--device none, or thimble --kv f16)");
    }
    geometry.head_dim[int(kind)] = dim;
  }
  geometry.n_kv_heads = n_kv_heads;
  geometry.group = group;
  set_heads(layer, geometry);
  make_layer(layer, geometry);
}

// Where the device has a part of the heads and it is known which.
void KvBuffer::set_heads(const ManagedLayer& layer, LayerGeometry& geometry) {
  const PartOfRow &keys = layer.parts[int(Kind::key)], &values = layer.parts[int(Kind::value)];
  const int64_t key_dim = geometry.head_dim[int(Kind::key)], value_dim = geometry.head_dim[int(Kind::value)];
  if (!keys.is_whole_known() || !values.is_whole_known()) return;
  if (keys.first % key_dim != 0 || keys.row->width % key_dim != 0 || keys.first / key_dim * value_dim != values.first ||
      keys.row->width / key_dim * value_dim != values.row->width) {
    return;
  }
  geometry.first_head = int(keys.first / key_dim);
  geometry.heads_of_layer = int(keys.row->width / key_dim);
}

void KvBuffer::bind_keys_alone(ManagedLayer& layer, bool as_f16, int group) {
  if (layer.plan) return;
  LayerGeometry geometry = caches_.at(layer.index);
  geometry.as_f16 = as_f16;
  geometry.latent = layer.latent;
  geometry.group = group;
  geometry.head_dim[int(Kind::key)] = piece_of_row(geometry.width[int(Kind::key)]);
  geometry.n_kv_heads = int(geometry.width[int(Kind::key)] / geometry.head_dim[int(Kind::key)]);
  geometry.width[int(Kind::value)] = 0;  // where there is a tensor for values, nothing is ever written to it
  make_layer(layer, geometry);
}

void KvBuffer::make_layer(ManagedLayer& layer, LayerGeometry geometry) {
  std::copy(std::begin(layer.rotated), std::end(layer.rotated), geometry.rotated);
  geometry.query_norm = layer.query_norm;
  geometry.key_norm = layer.key_norm;
  geometry.norms_unread = layer.norms_unread;
  const LayerPlan plan = planner_->plan(geometry);
  uint8_t* memory[2];
  if (plan.latent > 0) {  // both sides lie in the keys' tensor
    LayerPlan whole = plan;
    whole.bytes[0] += whole.bytes[1];
    memory[0] = memory_of(layer, whole, Kind::key);
    memory[1] = memory[0] + plan.bytes[0];
  } else {
    for (Kind kind : {Kind::key, Kind::value}) memory[int(kind)] = memory_of(layer, plan, kind);
  }
  cache_->add_layer(plan, planner_->codecs(plan), memory);
  layer.plan = plan;
  device_.report_caches();
}

// The tensor's memory, or new memory where that is too small for the true head size.
uint8_t* KvBuffer::memory_of(const ManagedLayer& layer, const LayerPlan& plan, Kind kind) {
  const ggml_tensor* tensor = layer.tensors[int(kind)];
  if (plan.bytes[int(kind)] == 0) return nullptr;
  if (far_.find(tensor)) {
    if (uint8_t* place = far_.place(tensor, plan.bytes[int(kind)])) {
      back(place, plan.bytes[int(kind)]);
      return place;
    }
  } else {
    const LayerPlan reserved =
        planner_->plan(caches_.at(layer.index));  // made without the heads, as the allocation was
    if (plan.bytes[int(kind)] <= reserved.bytes[int(kind)]) return static_cast<uint8_t*>(tensor->data);
  }
  Buffer buffer(ggml_backend_buft_alloc_buffer(inner_->buft, plan.bytes[int(kind)]));
  if (!buffer) {
    throw std::runtime_error("layer " + std::to_string(layer.index) + ": no memory for its codes (" +
                             std::to_string(plan.bytes[int(kind)] >> 20) + " MiB): use a smaller context");
  }
  ggml_backend_buffer_clear(buffer.get(), 0);
  more_.push_back(std::move(buffer));
  return static_cast<uint8_t*>(ggml_backend_buffer_get_base(more_.back().get()));
}

bool KvBuffer::all_bound() const {
  return std::all_of(layers_.begin(), layers_.end(), [](const auto& entry) { return entry.second.plan.has_value(); });
}

void KvBuffer::add_to(PlanTotals& totals) const {
  for (const auto& [index, geometry] : caches_) {
    const auto layer = layers_.find(index);
    if (const auto left = left_.find(index); left != left_.end()) {
      LayerPlan plan;
      plan.layer = index;
      plan.why_f16 = left->second;
      plan.f16_bytes = size_t(geometry.width[0] + geometry.width[1]) * sizeof(uint16_t) *
                       size_t(geometry.cells_per_stream * geometry.n_streams);
      totals.add(plan);
    } else {
      LayerPlan plan = layer == layers_.end() ? planner_->plan(geometry) : *layer->second.plan;
      if (const auto type = types_.find(index); !plan.coded && type != types_.end()) {
        plan.why_f16 += std::string(" (or ") + ggml_type_name(type->second) + ", as llama.cpp was told to keep them)";
      }
      totals.add(plan);
    }
  }
}

void KvBuffer::use() {
  said_refusal_ = has_new_refusal_ = false;
  last_data_ = nullptr;
  saved_ = {};
  in_use_ = true;
}

void KvBuffer::tell_of_reading(const ggml_tensor* node) {
  const auto is_slow = [](const ggml_tensor* view) {
    const ManagedLayer* layer = view ? layer_of(view) : nullptr;
    return layer && !layer->plan->as_f16;
  };
  const auto* slow = std::find_if(std::begin(node->src), std::end(node->src), is_slow);
  if (slow == std::end(node->src) || std::exchange(told_of_reading_, true)) return;
  const ManagedLayer& layer = *layer_of(*slow);
  std::string why =
      std::string("this model's graph reads the cache by ") + ggml_op_desc(node) + " (" + node->name + ")";
  const bool is_one_row = layer.plan->keys_alone() || layer.plan->latent > 0;
  if (is_one_row) {
    why = "keys and values of this model are one row (MLA), for which there are no kernels on this device";
  } else if (node->op == GGML_OP_FLASH_ATTN_EXT && layer.plan->as_rows) {
    why = "this device has no kernels over codes for heads of " + std::to_string(layer.plan->side(Kind::key).head_dim) +
          " and " + std::to_string(layer.plan->side(Kind::value).head_dim) + " numbers, " +
          std::to_string(layer.plan->group) + " query heads to a KV head and " +
          std::to_string(layer.plan->shape.cells_per_stream) + " cells";
  }
  GGML_LOG_WARN(
      "thimble: attention is computed from rows of the KV cache that are decoded for every batch, which is slow: %s\n",
      layer.transposed ? "flash attention is off; --flash-attn on attends to the codes, where the model can have it"
                       : (why + ". Only an f16 cache is faster (--device none, or thimble --kv f16)").c_str());
}

}  // namespace thimble
