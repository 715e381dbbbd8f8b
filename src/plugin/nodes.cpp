#include "plugin/nodes.h"

#include <cstring>

#include "plugin/kv_buffer.h"

namespace thimble {
namespace {

constexpr const char* kFlashAttentionOff =
    "flash attention is off, which a coded cache needs: start with --flash-attn on, or run a model that cannot have it "
    "without the THIMBLE device";

// Half a sentence that says why an attention node over coded caches cannot be served, or "".
std::string attention_problem(const ggml_tensor* node) {
  const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3];
  Kind k_kind = Kind::value, v_kind = Kind::key;
  const ManagedLayer* k_layer = KvBuffer::layer_of(k, &k_kind);
  const ManagedLayer* v_layer = KvBuffer::layer_of(v, &v_kind);
  if (k_layer != v_layer || k_kind != Kind::key || v_kind != Kind::value) {
    return "its keys and values are not of one plain cache (MLA or the like)";
  }
  if (q->type != GGML_TYPE_F32 || (mask && mask->type != GGML_TYPE_F16))
    return "its queries or mask are of an odd type";
  if (k->nb[0] != sizeof(uint16_t) || v->nb[0] != sizeof(uint16_t) || q->nb[0] != sizeof(float)) {
    return "its cache is transposed";
  }
  if (q->ne[2] % k->ne[2] != 0 || k->ne[2] != v->ne[2] || q->ne[3] != k->ne[3])
    return "its heads do not fit the cache's";
  return {};
}

}  // namespace

bool is_view_op(ggml_op op) {
  return op == GGML_OP_NONE || op == GGML_OP_VIEW || op == GGML_OP_RESHAPE || op == GGML_OP_PERMUTE ||
         op == GGML_OP_TRANSPOSE;
}

NodeKind classify(const ggml_tensor* node, std::string* why) {
  const auto refuse = [&](const std::string& what) {
    if (why) {
      *why = std::string(ggml_op_name(node->op)) + " on the KV cache (" + node->name + "): " + what +
             "; Thimble cannot code this model's cache: run it without the THIMBLE device (--device none, or thimble "
             "--kv f16)";
    }
    return NodeKind::refused;
  };
  if (node->op == GGML_OP_FLASH_ATTN_EXT && (KvBuffer::layer_of(node->src[1]) || KvBuffer::layer_of(node->src[2]))) {
    const std::string problem = attention_problem(node);
    return problem.empty() ? NodeKind::attend : refuse(problem);
  }
  const bool writes = KvBuffer::layer_of(node) != nullptr;
  bool reads = false;
  for (const ggml_tensor* src : node->src) reads = reads || (src && KvBuffer::layer_of(src));
  if (!writes && !reads) return NodeKind::other;
  if (is_view_op(node->op)) return NodeKind::view;
  if (node->op == GGML_OP_SET_ROWS && writes) {
    const ggml_tensor* rows = node->src[0];
    if (node->ne[0] != root_of(node)->ne[0]) {
      if (why) *why = kFlashAttentionOff;
      return NodeKind::refused;
    }
    if ((rows->type != GGML_TYPE_F32 && rows->type != GGML_TYPE_F16) || rows->ne[2] != 1 || rows->ne[3] != 1 ||
        rows->nb[0] != ggml_type_size(rows->type)) {
      return refuse("its rows are laid out oddly");
    }
    return NodeKind::write;
  }
  Kind kind;
  if (node->op == GGML_OP_ROPE && writes && KvBuffer::layer_of(node, &kind) && kind == Kind::key && node->view_src) {
    return NodeKind::shift;
  }
  if (node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_SOFT_MAX || node->op == GGML_OP_CONT) {
    if (why) *why = kFlashAttentionOff;
    return NodeKind::refused;
  }
  return refuse("the node is unknown");
}

void bind(const ggml_tensor* node) {
  const ggml_tensor *k = node->src[1], *v = node->src[2];
  KvBuffer::of(k)->bind(*KvBuffer::layer_of(k), int(k->ne[0]), int(v->ne[0]), int(k->ne[2]));
}

WriteTask write_task(const ggml_tensor* node) {
  const ggml_tensor *rows = node->src[0], *cells = node->src[1];
  WriteTask task;
  task.layer = KvBuffer::layer_of(node, &task.kind)->index;
  task.n_rows = rows->ne[1];
  task.rows = rows->data;
  task.is_f16 = rows->type == GGML_TYPE_F16;
  task.row_bytes = rows->nb[1];
  task.cells = cells->data;
  task.is_i64 = cells->type == GGML_TYPE_I64;
  task.cell_bytes = cells->nb[0];
  return task;
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
  return {};
}

}  // namespace thimble
