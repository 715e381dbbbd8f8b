#include "plugin/cpu_graph.h"

#include <cstring>
#include <map>
#include <stdexcept>

#include "codec/half.h"
#include "ggml-impl.h"
#include "plugin/nodes.h"
#include "plugin/sight.h"

namespace thimble {

void CpuGraph::run_write(ggml_tensor*, int thread, int n_threads, void* data) {
  Op& op = *static_cast<Op*>(data);
  const ggml_tensor *rows = op.node->src[0], *index = op.node->src[1];
  if (rows->ne[1] <= kMaxCodeTokens) {  // to wait for one another would take longer than to store so few rows
    if (thread > 0) return;
    n_threads = 1;
  }
  try {
    if (thread == 0) {
      op.cells.resize(rows->ne[1]);
      for (int64_t i = 0; i < rows->ne[1]; i++) {
        const char* at = static_cast<const char*>(index->data) + i * index->nb[0];
        op.cells[i] = index->type == GGML_TYPE_I64 ? *reinterpret_cast<const int64_t*>(at)
                                                   : *reinterpret_cast<const int32_t*>(at);
      }
      op.failed = op.graph->failed_;
      if (!op.failed) op.layer->cache->begin_write(op.kind, op.cells);
      for (int64_t cell : op.cells) op.layer->refused[int(op.kind)].erase(cell);
    }
  } catch (const std::exception& error) {
    GGML_LOG_ERROR("thimble: %s\n", error.what());
    op.failed = op.graph->failed_ = true;
  }
  op.barrier.wait(n_threads);
  if (op.failed) return;
  const int row_size = op.layer->cache->side(op.kind).row_size();
  std::vector<uint16_t> row(row_size);
  for (int64_t i = thread; i < rows->ne[1]; i += n_threads) {
    const char* at = static_cast<const char*>(rows->data) + i * rows->nb[1];
    if (rows->type == GGML_TYPE_F16) {
      std::memcpy(row.data(), at, row_size * sizeof(uint16_t));
    } else {
      ggml_fp32_to_fp16_row(reinterpret_cast<const float*>(at), row.data(), row_size);
    }
    op.layer->cache->write_row(op.kind, int(i), row.data());
  }
}

void CpuGraph::run_attend(ggml_tensor* dst, int thread, int n_threads, void* data) {
  Op& op = *static_cast<Op*>(data);
  const ggml_tensor *q = op.node->src[0], *k = op.node->src[1], *v = op.node->src[2], *mask = op.node->src[3];
  Attention& attention = op.graph->attention_;
  if (thread == 0) {
    try {
      const auto [scale, max_bias, softcap] = attention_parameters(op.node);
      AttentionProblem p;
      p.layer = op.layer->cache.get();
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
      p.out = static_cast<float*>(dst->data);
      p.out_head = dst->nb[1] / sizeof(float);
      p.out_token = dst->nb[2] / sizeof(float);
      p.out_stream = dst->nb[3] / sizeof(float);
      if (mask) {
        p.mask = static_cast<const uint16_t*>(mask->data);
        p.mask_token = mask->nb[1] / sizeof(uint16_t);
        p.mask_stream = mask->ne[3] > 1 ? mask->nb[3] / sizeof(uint16_t) : 0;
      }
      p.scale = scale;
      p.max_bias = max_bias;
      p.softcap = softcap;
      p.sinks = op.node->src[4] ? static_cast<const float*>(op.node->src[4]->data) : nullptr;
      p.top = op.layer->top;
      p.drop_tail = op.layer->drop_tail;
      if (sees_refused_cell(op.node, mask ? mask->data : nullptr, *op.layer)) {
        throw std::runtime_error(refused_cell_seen(*op.layer));
      }
      op.failed = op.graph->failed_;
      if (!op.failed) {
        const bool rows_match = int64_t(op.layer->cache->window().batch().size()) == q->ne[1] * q->ne[3];
        const Sight sight(op.node, mask ? mask->data : nullptr);
        if (rows_match) op.layer->cache->settle([&](int row, int64_t cell) { return sight.sees(row, cell); });
        attention.prepare(p, n_threads, kernels());
        if (op.commits) {
          const BatchQueries queries{p.q, p.n_heads, int(q->ne[0]), p.n_tokens, p.q_token, p.q_head, p.q_stream};
          op.layer->cache->begin_commit([&](int row, int64_t cell) { return !rows_match || sight.sees(row, cell); },
                                        rows_match ? queries : BatchQueries{});
        }
      }
    } catch (const std::exception& error) {
      GGML_LOG_ERROR("thimble: %s\n", error.what());
      op.failed = op.graph->failed_ = true;
    }
  }
  op.barrier.wait(n_threads);
  if (op.failed) return;
  if (attention.retrieves()) {
    attention.retrieve(thread);
    op.barrier.wait(n_threads);
  }
  attention.attend(thread);
  if (!op.commits) return;
  op.barrier.wait(n_threads);  // what leaves the window is coded into blocks that are being read
  op.layer->cache->code_leaving(thread, n_threads);
  if (op.barrier.is_last(n_threads)) op.layer->cache->end_commit();
}

ggml_status CpuGraph::run_segment(ggml_cgraph* graph, int first, int last) {
  if (first == last) return GGML_STATUS_SUCCESS;
  ggml_cgraph view = ggml_graph_view(graph, first, last);
  // A view shares no use counts with its graph, which the inner backend needs to fuse nodes; a whole graph stays whole.
  return ggml_backend_graph_compute(inner_, first == 0 && last == ggml_graph_n_nodes(graph) ? graph : &view);
}

ggml_status CpuGraph::compute(ggml_cgraph* graph) {
  const int n_nodes = ggml_graph_n_nodes(graph);
  ggml_tensor** nodes = ggml_graph_nodes(graph);
  ops_.clear();
  nodes_.clear();
  failed_ = false;
  std::map<const ManagedLayer*, Op*> last_attention;
  std::vector<std::pair<int, ggml_tensor*>> replaced;
  // Layers are bound when llama.cpp asks whether we support their attention; ggml's Meta device does not ask.
  for (int i = 0; i < n_nodes; i++) {
    if (nodes[i]->op == GGML_OP_FLASH_ATTN_EXT && classify(nodes[i]) == NodeKind::attend) bind(nodes[i]);
  }
  ggml_status status = GGML_STATUS_SUCCESS;
  int begin = 0;
  for (int i = 0; i < n_nodes && status == GGML_STATUS_SUCCESS; i++) {
    ggml_tensor* node = nodes[i];
    std::string why;
    const NodeKind kind = classify(node, &why);
    if (kind == NodeKind::other || kind == NodeKind::view) continue;
    if (kind == NodeKind::refused) {
      GGML_LOG_ERROR("thimble: %s\n", why.c_str());
      status = GGML_STATUS_FAILED;
    } else if (kind == NodeKind::shift) {
      status = run_segment(graph, begin, i);
      if (status == GGML_STATUS_SUCCESS) status = shift(node);
      begin = i + 1;
    } else {
      const ggml_tensor* cache = kind == NodeKind::write ? node : node->src[1];
      Op& op = ops_.emplace_back();
      op.layer = KvBuffer::layer_of(cache, &op.kind);
      op.node = node;
      op.graph = this;
      KvBuffer::of(cache)->use(kernels().name);
      if (!op.layer->cache) {
        GGML_LOG_ERROR("thimble: layer %d is used before its shape is known\n", op.layer->index);
        status = GGML_STATUS_FAILED;
        break;
      }
      if (kind == NodeKind::attend) last_attention[op.layer] = &op;
      ggml_tensor& stand_in = nodes_.emplace_back(*node);
      stand_in.op = GGML_OP_CUSTOM;
      const ggml_custom_op_params params{kind == NodeKind::write ? run_write : run_attend, GGML_N_TASKS_MAX, &op};
      std::memcpy(stand_in.op_params, &params, sizeof(params));
      replaced.emplace_back(i, node);
      nodes[i] = &stand_in;
    }
  }
  for (auto& [layer, op] : last_attention) op->commits = true;
  if (status == GGML_STATUS_SUCCESS) status = run_segment(graph, begin, n_nodes);
  for (auto& [i, node] : replaced) nodes[i] = node;
  if (failed_ && status == GGML_STATUS_SUCCESS) status = GGML_STATUS_FAILED;
  return status;
}

// Context shift: the keys of cells whose position moves are decoded, rotated by ggml's own ROPE and coded again, a
// block of cells at a time.
ggml_status CpuGraph::shift(const ggml_tensor* node) {
  ManagedLayer* layer = KvBuffer::layer_of(node);
  if (!layer || !layer->cache) return GGML_STATUS_SUCCESS;  // nothing was ever written
  CacheLayer& cache = *layer->cache;
  CacheSide& keys = cache.side(Kind::key);
  const ggml_tensor *view = node->src[0], *by = node->src[1], *factors = node->src[2];
  const int row_size = keys.row_size(), head_dim = keys.format().head_dim, n_heads = keys.shape().n_kv_heads;
  const int64_t first_number = view->view_offs % root_of(view)->nb[1] / sizeof(uint16_t);  // rotated part of a head
  const int32_t* shifts = static_cast<const int32_t*>(by->data);

  std::vector<int64_t> cells;
  const auto flush = [&]() {
    const int64_t n = int64_t(cells.size());
    if (n == 0) return GGML_STATUS_SUCCESS;
    const size_t bytes = n * row_size * sizeof(float) + n * sizeof(int32_t) + 8 * ggml_tensor_overhead() +
                         ggml_graph_overhead_custom(8, false) + 4096;
    ggml_context* ctx = ggml_init({bytes, nullptr, false});
    ggml_tensor* x = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, head_dim, n_heads, n);
    ggml_tensor* positions = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
    float* numbers = static_cast<float*>(x->data);
    for (int64_t i = 0; i < n; i++) {
      if (const uint16_t* exact = cache.exact_row(Kind::key, cells[i])) {
        ggml_fp16_to_fp32_row(exact, numbers + i * row_size, row_size);
      } else {
        keys.decode_row(cells[i], numbers + i * row_size);
      }
      static_cast<int32_t*>(positions->data)[i] = shifts[cells[i]];
    }
    ggml_tensor* part = ggml_view_3d(ctx, x, view->ne[0], n_heads, n, x->nb[1], x->nb[2], first_number * sizeof(float));
    ggml_tensor* rotate = ggml_view_tensor(ctx, part);
    rotate->op = GGML_OP_ROPE;
    std::memcpy(rotate->op_params, node->op_params, sizeof(node->op_params));
    rotate->src[0] = part;
    rotate->src[1] = positions;
    rotate->src[2] = const_cast<ggml_tensor*>(factors);
    ggml_cgraph* graph = ggml_new_graph_custom(ctx, 8, false);
    ggml_build_forward_expand(graph, rotate);
    const ggml_status status = ggml_backend_graph_compute(inner_, graph);
    std::vector<uint16_t> row(row_size);
    for (int64_t i = 0; i < n && status == GGML_STATUS_SUCCESS; i++) {
      ggml_fp32_to_fp16_row(numbers + i * row_size, row.data(), row_size);
      if (uint16_t* exact = cache.exact_row(Kind::key, cells[i])) {
        std::memcpy(exact, row.data(), row_size * sizeof(uint16_t));
      }
      if (cache.window().find(cells[i]) < 0) keys.encode_row(row.data(), cells[i]);
    }
    ggml_free(ctx);
    cells.clear();
    return status;
  };
  for (int64_t cell = 0; cell < view->ne[2]; cell++) {
    if (shifts[cell] == 0) continue;
    cells.push_back(cell);
    if (cells.size() == 256) {
      const ggml_status status = flush();
      if (status != GGML_STATUS_SUCCESS) return status;
    }
  }
  return flush();
}

}  // namespace thimble
