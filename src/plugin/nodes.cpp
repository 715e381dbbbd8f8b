#include "plugin/nodes.h"

#include <algorithm>
#include <cstring>

#include "calibrate/norm_weights.h"
#include "plugin/kv_buffer.h"
#include "plugin/row_reader.h"

namespace thimble {
namespace {

// Whether a view of a cache is [head size][cells][heads][streams], with the heads of all cells.
bool shows_heads(const ggml_tensor* view) {
  const ggml_tensor* cache = root_of(view);
  return view->ne[0] * view->ne[2] == cache->ne[0] && view->nb[0] == sizeof(uint16_t) && view->nb[1] == cache->nb[1] &&
         (view->ne[2] == 1 || view->nb[2] == size_t(view->ne[0]) * sizeof(uint16_t)) &&
         (view->ne[3] == 1 || view->nb[3] == cache->nb[2]);
}

// Whether an attention node over coded caches is plain, so that it can be run on codes.
bool is_plain_attention(const ggml_tensor* node) {
  const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3];
  Kind k_kind = Kind::value, v_kind = Kind::key;
  const ManagedLayer* k_layer = KvBuffer::layer_of(k, &k_kind);
  const ManagedLayer* v_layer = KvBuffer::layer_of(v, &v_kind);
  if (!k_layer || k_layer != v_layer || k_kind != Kind::key || v_kind != Kind::value || k_layer->transposed)
    return false;
  if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || (mask && mask->type != GGML_TYPE_F16)) return false;
  return shows_heads(k) && shows_heads(v) && k->ne[2] == v->ne[2] && q->ne[2] % k->ne[2] == 0 && q->ne[3] == k->ne[3];
}

// Whether values are written number by number, as llama.cpp does with flash attention off.
bool is_transposed_write(const ggml_tensor* node) {
  Kind kind = Kind::key;
  if (!KvBuffer::layer_of(node, &kind) || kind != Kind::value) return false;
  const ggml_tensor *rows = node->src[0], *cache = root_of(node);
  return node->ne[0] == 1 && cache->ne[0] > 1 && rows->ne[0] == 1 && rows->ne[1] % cache->ne[0] == 0 &&
         rows->nb[1] == ggml_type_size(rows->type);
}

// Whether RoPE has rotated the numbers of a tensor.
bool is_rotated(const ggml_tensor* x) {
  for (int depth = 0; depth < 8 && x && (is_view_op(x->op) || x->op == GGML_OP_CONT); depth++) x = x->src[0];
  return x && x->op == GGML_OP_ROPE;
}

// Of the rows that are written to a cache with keys alone: how many of their first numbers come from another tensor
// than the others and are not rotated by RoPE; 0 where that is not seen. They are what keys and values share (MLA).
int latent_of(const ggml_tensor* rows) {
  for (int depth = 0; rows && depth < 8; depth++, rows = rows->src[0]) {
    if (rows->op == GGML_OP_CONCAT) break;
    if (!is_view_op(rows->op) && rows->op != GGML_OP_CONT) return 0;
  }
  if (!rows || rows->op != GGML_OP_CONCAT || rows->op_params[0] != 0) return 0;
  const int64_t latent = rows->src[0]->ne[0], rotated = rows->src[1]->ne[0];
  const bool fits = latent <= kMaxHeadDim && latent % 8 == 0 && rotated <= kMaxHeadDim && rotated % 4 == 0;
  return fits && !is_rotated(rows->src[0]) ? int(latent) : 0;
}

// Whether an attention node over a latent cache attends to whole rows, and its values are their first numbers.
bool is_latent_attention(const ggml_tensor* node) {
  const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3];
  const ManagedLayer* layer = KvBuffer::layer_of(k);
  if (!layer || layer != KvBuffer::layer_of(v) || root_of(k) != root_of(v) || v->view_offs != k->view_offs)
    return false;
  if (!layer->plan || layer->plan->latent == 0 || layer->plan->as_rows || v->ne[0] != layer->plan->latent) return false;
  if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || (mask && mask->type != GGML_TYPE_F16)) return false;
  return shows_heads(k) && k->ne[2] == 1 && v->ne[2] == 1 && v->nb[0] == sizeof(uint16_t) && v->nb[1] == k->nb[1] &&
         v->ne[1] == k->ne[1] && v->ne[3] == k->ne[3] && (v->ne[3] == 1 || v->nb[3] == k->nb[3]) &&
         q->ne[0] == k->ne[0] && q->ne[3] == k->ne[3];
}

std::string refused(const ggml_tensor* node, const char* what) {
  return std::string(ggml_op_name(node->op)) + " on the KV cache (" + node->name + "): " + what +
         "; Thimble cannot code this model's cache: run it without the THIMBLE device (--device none, or thimble "
         "--kv f16)";
}

}  // namespace

bool is_view_op(ggml_op op) {
  return op == GGML_OP_NONE || op == GGML_OP_VIEW || op == GGML_OP_RESHAPE || op == GGML_OP_PERMUTE ||
         op == GGML_OP_TRANSPOSE;
}

NodeKind classify(const ggml_tensor* node, std::string* why) {
  const auto refuse = [&](const char* what) {
    if (why) *why = refused(node, what);
    return NodeKind::refused;
  };
  if (node->op == GGML_OP_FLASH_ATTN_EXT && is_plain_attention(node)) return NodeKind::attend;
  const bool writes = KvBuffer::layer_of(node) != nullptr;
  bool reads = false;
  for (const ggml_tensor* src : node->src) reads = reads || (src && KvBuffer::layer_of(src));
  if (!writes && !reads) return NodeKind::other;
  if (is_view_op(node->op)) return NodeKind::view;
  if (node->op == GGML_OP_SET_ROWS && writes) {
    const ggml_tensor* rows = node->src[0];
    const bool is_plain = node->ne[0] == root_of(node)->ne[0] && rows->nb[0] == ggml_type_size(rows->type);
    if ((rows->type != GGML_TYPE_F32 && rows->type != GGML_TYPE_F16) || rows->ne[2] != 1 || rows->ne[3] != 1 ||
        (!is_plain && !is_transposed_write(node))) {
      return refuse("its rows are laid out oddly");
    }
    return NodeKind::write;
  }
  Kind kind;
  if (node->op == GGML_OP_ROPE && writes && KvBuffer::layer_of(node, &kind) && kind == Kind::key && node->view_src) {
    return NodeKind::shift;
  }
  return writes ? refuse("the node is unknown") : NodeKind::read;
}

NodeKind bind(const ggml_tensor* node, NodeKind kind) {
  if (kind == NodeKind::write) {
    Kind side;
    ManagedLayer* layer = KvBuffer::layer_of(node, &side);
    layer->written[int(side)] = true;
    // The f16 cache of an indexer is rotated too, and there llama.cpp itself shifts the rotated keys.
    if (KvBuffer::of(node)->was_quantized(layer->index)) layer->rotated[int(side)] = rotated_by(node->src[0]);
    if (side == Kind::key && !layer->plan) {
      layer->key_norm = norm_weights(node->src[0], &layer->norms_unread);
      layer->latent = latent_of(node->src[0]);
    }
    layer->transposed = layer->transposed || is_transposed_write(node);
  }
  if (kind == NodeKind::attend) {
    const ggml_tensor *k = node->src[1], *v = node->src[2];
    ManagedLayer& layer = *KvBuffer::layer_of(k);
    if (!layer.plan) layer.query_norm = norm_weights(node->src[0], &layer.norms_unread);
    KvBuffer::of(k)->bind(layer, int(k->ne[0]), int(v->ne[0]), int(k->ne[2]), int(node->src[0]->ne[2] / k->ne[2]));
    return layer.plan->as_rows ? NodeKind::read : kind;
  }
  if (kind != NodeKind::read) return kind;
  for (const ggml_tensor* view : node->src) {
    Kind side = Kind::key;
    ManagedLayer* layer = view ? KvBuffer::layer_of(view, &side) : nullptr;
    if (!layer || layer->plan || !layer->written[int(Kind::key)]) continue;
    if (!layer->written[int(Kind::value)]) {
      // Keys alone are values as well (MLA) where attention reads them. Other nodes find out with them which cells to
      // attend to.
      const bool attends =
          node->op == GGML_OP_FLASH_ATTN_EXT || node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_CONT;
      const ggml_tensor *q = node->src[0], *k = node->src[1];
      const int group = node->op == GGML_OP_FLASH_ATTN_EXT && q && k ? int(q->ne[2] / k->ne[2]) : 0;
      KvBuffer::of(view)->bind_keys_alone(*layer, /*as_f16=*/!attends, group);
      continue;
    }
    if (side == Kind::value && layer->transposed) continue;
    // The dimension of adjacent numbers is a head.
    int64_t head = 0;
    for (int i = 0; i < GGML_MAX_DIMS; i++) {
      if (view->nb[i] == sizeof(uint16_t)) head = std::max(head, view->ne[i]);
    }
    if (head == 0 || root_of(view)->ne[0] % head != 0) continue;
    const int64_t n_heads = root_of(view)->ne[0] / head;
    const auto dim = [&](Kind of) {
      const ggml_tensor* cache = layer->tensors[int(of)];
      return cache ? int(cache->ne[0] / n_heads) : 0;
    };
    if (node->op == GGML_OP_MUL_MAT && side == Kind::key)
      layer->query_norm = norm_weights(node->src[1], &layer->norms_unread);
    KvBuffer::of(view)->bind(*layer, dim(Kind::key), dim(Kind::value), int(n_heads), /*group=*/0);
  }
  return node->op == GGML_OP_FLASH_ATTN_EXT && is_latent_attention(node) ? NodeKind::attend : kind;
}

WriteTask write_task(const ggml_tensor* node) {
  const ggml_tensor *rows = node->src[0], *cells = node->src[1];
  WriteTask task;
  task.layer = KvBuffer::layer_of(node, &task.kind)->index;
  const ggml_tensor* cache = root_of(node);
  const int64_t numbers = is_transposed_write(node) ? cache->ne[0] : 1;  // that llama.cpp writes one by one
  task.n_rows = rows->ne[1] / numbers;
  task.rows = rows->data;
  task.is_f16 = rows->type == GGML_TYPE_F16;
  task.row_bytes = rows->nb[1] * numbers;
  task.cells = cells->data;
  task.is_i64 = cells->type == GGML_TYPE_I64;
  task.cell_bytes = cells->nb[0] * numbers;
  if (numbers > 1) {
    task.stream_places = cache->ne[0] * cache->ne[1];
    task.stream_cells = cache->ne[1];
  }
  return task;
}

std::vector<WriteTask> tasks_of_parts(const ManagedLayer& layer, const WriteTask& task) {
  std::vector<WriteTask> tasks;
  for (const RowPart& part : row_parts(*layer.plan, task.kind)) {
    WriteTask of_part = task;
    of_part.kind = part.kind;
    const size_t number = task.is_f16 ? sizeof(uint16_t) : sizeof(float);
    of_part.rows = static_cast<const char*>(task.rows) + part.first * number;
    tasks.push_back(of_part);
  }
  return tasks;
}

std::vector<ReadTask> tasks_of_parts(const ManagedLayer& layer, const ReadTask& task) {
  if (layer.plan->latent == 0) return {task};
  std::vector<ReadTask> tasks;
  for (const RowPart& part : row_parts(*layer.plan, task.kind)) {
    ReadTask of_part = task;
    of_part.kind = part.kind;
    of_part.rows = task.rows + part.first;
    of_part.row_stride = size_t(layer.tensors[int(task.kind)]->ne[0]);
    of_part.ends_batch = false;
    tasks.push_back(of_part);
  }
  tasks.back().ends_batch = task.ends_batch;
  return tasks;
}

AttendTask attend_task(const ggml_tensor* node) {
  const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3],
                    *sinks = node->src[4];
  AttendTask task;
  task.layer = KvBuffer::layer_of(k)->index;
  task.key_dim = int(q->ne[0]);
  task.has_sinks = sinks != nullptr;
  AttentionProblem& p = task.problem;
  p.n_heads = int(q->ne[2]);
  p.n_tokens = int(q->ne[1]);
  p.n_streams = int(q->ne[3]);
  p.first_stream = int(k->view_offs / root_of(k)->nb[2]);
  p.n_cells = k->ne[1];
  p.value_dim = int(v->ne[0]);
  p.q = static_cast<const float*>(q->data);
  p.q_token = q->nb[1] / sizeof(float);
  p.q_head = q->nb[2] / sizeof(float);
  p.q_stream = q->nb[3] / sizeof(float);
  p.out = static_cast<float*>(node->data);
  p.out_head = node->nb[1] / sizeof(float);
  p.out_token = node->nb[2] / sizeof(float);
  p.out_stream = node->nb[3] / sizeof(float);
  if (mask) {
    p.mask = static_cast<const uint16_t*>(mask->data);
    p.mask_token = mask->nb[1] / sizeof(uint16_t);
    p.mask_stream = mask->ne[3] > 1 ? mask->nb[3] / sizeof(uint16_t) : 0;
  }
  std::memcpy(&p.scale, node->op_params, sizeof(float));  // in ggml's order: scale, max_bias, softcap
  std::memcpy(&p.max_bias, node->op_params + 1, sizeof(float));
  std::memcpy(&p.softcap, node->op_params + 2, sizeof(float));
  p.sinks = sinks ? static_cast<const float*>(sinks->data) : nullptr;
  return task;
}

std::string refusal(const ggml_tensor* node, NodeKind kind) {
  if (kind == NodeKind::write) return KvBuffer::of(node)->cache().refusal(write_task(node));
  if (kind == NodeKind::attend) return KvBuffer::of(node->src[1])->cache().refusal(attend_task(node));
  if (kind != NodeKind::read) return {};
  for (const ggml_tensor* view : node->src) {
    const ManagedLayer* layer = view ? KvBuffer::layer_of(view) : nullptr;
    if (!layer) continue;
    if (!layer->plan) return refused(node, "it does not show the heads of the cache");
    const auto rows = rows_of_view(view);
    if (!rows) return refused(node, "its view of the cache is laid out oddly");
    if (std::string why = KvBuffer::of(view)->cache().refusal(rows->task); !why.empty()) return why;
  }
  return {};
}

}  // namespace thimble
