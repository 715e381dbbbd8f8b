#include "plugin/cuts.h"

#include <algorithm>
#include <stdexcept>

namespace thimble {
namespace {

bool overlap(const ggml_tensor* a, const ggml_tensor* b) {
  const char *a_data = static_cast<const char*>(a->data), *b_data = static_cast<const char*>(b->data);
  return a_data < b_data + ggml_nbytes(b) && b_data < a_data + ggml_nbytes(a);
}

class Planner {
public:
  std::vector<Step> plan(ggml_cgraph* graph) {
    for (int i = 0; i < graph->n_nodes; i++) {
      ggml_tensor* node = graph->nodes[i];
      if ((node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) continue;
      std::string why;
      NodeKind kind = classify(node, &why);
      if (kind == NodeKind::refused) throw std::runtime_error(why);
      kind = bind(node, kind);
      if (kind == NodeKind::view) continue;
      if (kind == NodeKind::write) {
        write(node);
        continue;
      }
      const bool reads = kind == NodeKind::attend || kind == NodeKind::read;
      const Layers layers = reads ? layers_of(node) : Layers();
      if (!is_view_op(node->op)) flush_overwritten(node, layers);
      if (kind == NodeKind::other) {
        inner_.push_back(node);
      } else if (kind == NodeKind::attend) {
        Cut cut = take(KvBuffer::layer_of(node->src[1]));
        cut.buffer = KvBuffer::of(node->src[1]);
        cut.attend = node;
        emit(cut);
      } else if (kind == NodeKind::read) {
        for (ManagedLayer* layer : layers) {
          if (layer != layers.front()) emit(take(layer));
        }
        Cut cut = take(layers.front());
        cut.buffer = KvBuffer::of(layers.front()->tensors[0]);
        cut.read = node;
        emit(cut);
      } else {
        emit(take(KvBuffer::layer_of(node)));
        Cut cut;
        cut.buffer = KvBuffer::of(node);
        cut.layer = KvBuffer::layer_of(node);
        cut.shift = node;
        emit(cut);
      }
    }
    while (!pending_.empty()) emit(take(pending_.front().layer));
    if (!inner_.empty()) emit({});
    return std::move(steps_);
  }

private:
  using Layers = std::vector<ManagedLayer*>;

  // Those that a node reads.
  static Layers layers_of(const ggml_tensor* node) {
    Layers layers;
    for (const ggml_tensor* src : node->src) {
      ManagedLayer* layer = src ? KvBuffer::layer_of(src) : nullptr;
      if (layer && std::find(layers.begin(), layers.end(), layer) == layers.end()) layers.push_back(layer);
    }
    return layers;
  }

  void write(ggml_tensor* node) {
    Kind kind;
    ManagedLayer* layer = KvBuffer::layer_of(node, &kind);
    auto it = find(layer);
    if (it != pending_.end() && it->writes[int(kind)]) {
      emit(take(layer));
      it = pending_.end();
    }
    if (it == pending_.end()) {
      it = pending_.insert(it, Cut{});
      it->buffer = KvBuffer::of(node);
      it->layer = layer;
    }
    it->writes[int(kind)] = node;
  }

  // ggml may give the memory of a waiting write's rows to nodes behind the write. Writes that `node` would overwrite
  // are cut before it, unless `node` reads their own layer: then the rows are read first.
  void flush_overwritten(const ggml_tensor* node, const Layers& reads) {
    for (size_t i = 0; i < pending_.size();) {
      bool overwritten = false;
      for (const ggml_tensor* write : pending_[i].writes) {
        overwritten = overwritten || (write && (overlap(node, write->src[0]) || overlap(node, write->src[1])));
      }
      if (overwritten && std::find(reads.begin(), reads.end(), pending_[i].layer) == reads.end()) {
        emit(take(pending_[i].layer));
      } else {
        i++;
      }
    }
  }

  std::vector<Cut>::iterator find(const ManagedLayer* layer) {
    return std::find_if(pending_.begin(), pending_.end(), [&](const Cut& cut) { return cut.layer == layer; });
  }
  Cut take(ManagedLayer* layer) {
    Cut cut;
    cut.layer = layer;
    if (const auto it = find(layer); it != pending_.end()) {
      cut = *it;
      pending_.erase(it);
    }
    return cut;
  }
  void emit(const Cut& cut) {
    if (cut.layer && !cut.writes[0] && !cut.writes[1] && !cut.attend && !cut.read && !cut.shift) return;
    steps_.push_back({std::move(inner_), cut});
    inner_.clear();
  }

  std::vector<Step> steps_;
  std::vector<ggml_tensor*> inner_;
  std::vector<Cut> pending_;  // writes that wait for their attention
};

}  // namespace

std::vector<Step> plan_cuts(ggml_cgraph* graph) {
  return Planner().plan(graph);
}

}  // namespace thimble
