#include "plugin/far_caches.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "ggml-impl.h"
#include "plugin/kv_buffer.h"
#include "plugin/nodes.h"

namespace thimble {
namespace {

constexpr size_t kAlignment = 128;  // as much as any inner buffer has

// What is between two tensors that ggml has laid out one behind the other is less.
constexpr ptrdiff_t kGap = 4096;

struct Found {
  const ggml_tensor* tensor;
  CacheName name;
};

// Caches that nobody took before, in the order in which llama.cpp made them, which Device::is_window counts on.
std::vector<Found> find_new(const ggml_cgraph* graph) {
  std::vector<Found> found;
  for (int i = 0; i < graph->n_nodes; i++) {
    if (graph->nodes[i]->op != GGML_OP_SET_ROWS) continue;
    const ggml_tensor* root = root_of(graph->nodes[i]);
    KvBuffer* buffer = KvBuffer::of(root);
    if (!buffer || ggml_is_empty(root) || KvBuffer::layer_of(root) || buffer->far().find(root)) continue;
    const auto name = parse_cache_name(root->name);
    const bool again =
        std::any_of(found.begin(), found.end(), [&](const Found& f) { return f.tensor->data == root->data; });
    if (name && root->data && !again) found.push_back({root, *name});
  }
  const auto place = [](const Found& f) {
    return std::tuple(KvBuffer::of(f.tensor)->number(), f.name.layer, f.name.kind);
  };
  std::sort(found.begin(), found.end(), [&](const Found& a, const Found& b) { return place(a) < place(b); });
  return found;
}

// Why a node over coded caches cannot be run, or "". Binds the layer that it reads.
std::string try_node(const ggml_tensor* node, NodeKind kind, const std::string& why_refused) {
  try {
    if (kind == NodeKind::refused) return why_refused;
    if (kind == NodeKind::read || bind(node, kind) == NodeKind::read) {
      return "flash attention is off, or this model's graph reads the cache in another way, which is not served over "
             "RPC";
    }
    return refusal(node, kind);
  } catch (const std::exception& error) {
    return error.what();
  }
}

// Leaves the layers f16 that a node touches. Where a graph has run over their cache already, this graph will fail.
void leave_layers_of(const ggml_tensor* node, const std::string& why) {
  const auto leave = [&](const ggml_tensor* tensor) {
    const ManagedLayer* layer = KvBuffer::layer_of(tensor);
    if (layer && !KvBuffer::of(tensor)->in_use()) KvBuffer::of(tensor)->leave_f16(layer->index, why);
  };
  leave(node);
  for (const ggml_tensor* src : node->src) {
    if (src) leave(src);
  }
}

}  // namespace

const ggml_tensor* FarCaches::find(const ggml_tensor* tensor) const {
  if (tensors_.empty()) return nullptr;
  const char* at = static_cast<const char*>(root_of(tensor)->data);
  auto it = tensors_.upper_bound(at);
  if (it == tensors_.begin()) return nullptr;
  --it;
  return at < it->first + ggml_nbytes(&it->second) ? &it->second : nullptr;
}

ggml_tensor* FarCaches::add(const ggml_tensor* tensor) {
  return &tensors_.insert_or_assign(static_cast<const char*>(tensor->data), *tensor).first->second;
}

uint8_t* FarCaches::place(const ggml_tensor* tensor, size_t bytes) {
  char* const begin = static_cast<char*>(tensor->data);
  char* const end = begin + ggml_nbytes(tensor);
  const bool joins = run_end_ && begin >= run_end_ && begin - run_end_ < kGap;
  char* at = joins ? next_ : begin;
  at += (kAlignment - reinterpret_cast<uintptr_t>(at) % kAlignment) % kAlignment;
  if (at > end || bytes > size_t(end - at)) return nullptr;
  next_ = at + bytes;
  run_end_ = end;
  return reinterpret_cast<uint8_t*>(at);
}

void FarCaches::note_set(const ggml_tensor* tensor, size_t offset, size_t size) {
  const std::string_view name = tensor->name;  // "cache_k_l0 (view)"
  if (!parse_cache_name(name.substr(0, name.find(' '))) || find(tensor)) return;
  char* const data = static_cast<char*>(tensor->data) + offset;
  if (!early_.empty() && early_.back().data + early_.back().size == data) {
    early_.back().size += size;
  } else {
    early_.push_back({data, size});
  }
}

std::vector<FarCaches::Early> FarCaches::take_early() {
  return std::exchange(early_, {});
}

void KvBuffer::add_far(const ggml_tensor* tensor, const CacheName& name) {
  ggml_tensor* cache = far_.add(tensor);
  cache->op = GGML_OP_NONE;
  std::fill(std::begin(cache->src), std::end(cache->src), nullptr);
  try {
    const bool coded = !left_.count(name.layer) && cache->type == GGML_TYPE_F16;
    if (coded && add(cache, name)) return;
    // So that the report counts it.
    if (!planner_) planner_ = device_.planner();
    const LayerGeometry geometry = geometry_of(device_, cache, name);
    if (caches_.empty()) device_.add(*this);
    caches_.try_emplace(name.layer, geometry).first->second.width[int(name.kind)] = cache->ne[0];
    if (cache->type != GGML_TYPE_F16) {
      leave_f16(name.layer, std::string("the cache type is ") + ggml_type_name(cache->type));
    }
  } catch (const std::exception& error) {
    if (left_.empty()) GGML_LOG_ERROR("thimble: the KV cache stays f16: %s\n", error.what());
    leave_f16(name.layer, error.what());
  }
}

void KvBuffer::leave_f16(int layer, const std::string& why) {
  left_.try_emplace(layer, why);
  layers_.erase(layer);
  std::erase_if(by_tensor_, [&](const auto& entry) { return entry.second.layer == layer; });
  far_.end_run();
}

void KvBuffer::load_early() {
  struct Saved {
    const ggml_tensor* cache;
    size_t offset;
    std::vector<uint8_t> rows;
  };
  std::vector<Saved> saved;
  for (const FarCaches::Early& early : far_.take_early()) {
    ggml_tensor at{};
    at.data = early.data;
    const ggml_tensor* cache = far_.find(&at);
    if (!cache || !by_tensor_.count(cache)) continue;  // left f16: it is where it belongs
    const size_t offset = early.data - static_cast<const char*>(cache->data);
    std::vector<uint8_t> rows(early.size);
    inner_->iface.get_tensor(inner_, cache, rows.data(), offset, rows.size());
    saved.push_back({cache, offset, std::move(rows)});
  }
  if (saved.empty()) return;
  for (const Saved& s : saved) zero(static_cast<char*>(s.cache->data) + s.offset, s.rows.size());
  for (const Saved& s : saved) load(s.cache, s.rows.data(), s.offset, s.rows.size());
}

void take_far_caches(const ggml_cgraph* graph) {
  const std::vector<Found> found = find_new(graph);
  if (found.empty()) return;
  for (const Found& f : found) KvBuffer::of(f.tensor)->add_far(f.tensor, f.name);
  for (int i = 0; i < graph->n_nodes; i++) {
    const ggml_tensor* root = root_of(graph->nodes[i]);
    if (is_recurrent_state(root->name) && KvBuffer::of(root)) KvBuffer::of(root)->device().end_of_caches();
  }
  for (int i = 0; i < graph->n_nodes; i++) {
    const ggml_tensor* node = graph->nodes[i];
    std::string why_refused;
    const NodeKind kind = classify(node, &why_refused);
    if (kind == NodeKind::other || kind == NodeKind::view) continue;
    const std::string why = try_node(node, kind, why_refused);
    if (!why.empty()) leave_layers_of(node, why);
  }
  for (const Found& f : found) {
    const ManagedLayer* layer = KvBuffer::layer_of(f.tensor);
    if (layer && !layer->plan) KvBuffer::of(f.tensor)->leave_f16(layer->index, "no attention over it was seen");
  }
  for (const Found& f : found) KvBuffer::of(f.tensor)->load_early();
  KvBuffer::of(found.front().tensor)->device().report_caches();
}

}  // namespace thimble
