#include "plugin/row_reader.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <stdexcept>

#include "ggml-impl.h"
#include "plugin/nodes.h"

namespace thimble {
namespace {

constexpr size_t kNumber = sizeof(uint16_t);
constexpr size_t kAlignment = 256;

// The input that a mask is computed from: a tensor of as many cells that no node computes.
const ggml_tensor* input_of(const ggml_tensor* tensor, int64_t n_cells, std::set<const ggml_tensor*>& seen) {
  constexpr size_t kEnough = 64;  // a mask is not far from its input
  if (!tensor || seen.size() > kEnough || !seen.insert(tensor).second) return nullptr;
  if (tensor->op == GGML_OP_NONE && !tensor->view_src) {
    const bool fits = tensor->ne[0] == n_cells && tensor->ne[2] == 1 && tensor->data && tensor->buffer &&
                      (tensor->type == GGML_TYPE_F32 || tensor->type == GGML_TYPE_F16) && ggml_is_contiguous(tensor);
    return fits ? tensor : nullptr;
  }
  // What is added to other numbers is the mask.
  for (int i : {1, 0}) {
    if (const ggml_tensor* found = input_of(tensor->src[i], n_cells, seen)) return found;
  }
  return nullptr;
}

// The keys behind the scores that a softmax is computed of, or null.
const ggml_tensor* keys_of_scores(const ggml_tensor* scores) {
  for (int depth = 0; scores && depth < 12; depth++, scores = scores->src[0]) {
    if (scores->op == GGML_OP_MUL_MAT) return scores->src[0];
  }
  return nullptr;
}

// -infinity where a token may not see a cell, else 0.
std::vector<uint16_t> as_f16(const ggml_tensor* mask) {
  std::vector<uint16_t> out(ggml_nelements(mask));
  std::vector<uint8_t> bytes(ggml_nbytes(mask));
  ggml_backend_tensor_get(mask, bytes.data(), 0, bytes.size());
  if (mask->type == GGML_TYPE_F16) {
    std::memcpy(out.data(), bytes.data(), bytes.size());
    return out;
  }
  const float* numbers = reinterpret_cast<const float*>(bytes.data());
  std::transform(numbers, numbers + out.size(), out.begin(),
                 [](float x) { return std::isinf(x) ? uint16_t(0xfc00) : uint16_t(0); });
  return out;
}

}  // namespace

// A view's dimensions step from stream to stream, from row to row of memory, or within a row. The copy leaves the cells
// out that are not read, so that streams, and the rows of a transposed cache, lie closer together.
std::optional<RowsOfView> rows_of_view(const ggml_tensor* view) {
  RowsOfView rows;
  ReadTask& task = rows.task;
  const ManagedLayer* layer = KvBuffer::layer_of(view, &task.kind);
  const ggml_tensor* cache = layer->tensors[int(task.kind)];
  task.layer = layer->index;
  task.transposed = task.kind == Kind::value && layer->transposed;
  const size_t n_numbers = cache->ne[0], n_cells = cache->ne[1];
  const size_t stream = n_numbers * n_cells * kNumber, row = (task.transposed ? n_cells : n_numbers) * kNumber;
  const size_t begin = view->view_offs % stream;
  task.first_stream = int(view->view_offs / stream);
  size_t last_row = begin / row, last_in_row = begin % row / kNumber;
  for (int i = 0; i < GGML_MAX_DIMS; i++) {
    const size_t steps = view->ne[i] - 1, nb = view->nb[i];
    if (steps == 0) continue;
    if (nb % stream == 0) {
      task.n_streams += int(steps * (nb / stream));
    } else if (nb % row == 0) {
      last_row += steps * (nb / row);
    } else if (nb % kNumber == 0 && nb < row) {
      last_in_row += steps * (nb / kNumber);
    } else {
      return std::nullopt;
    }
  }
  // A dimension within a row may go on in the next rows, as where the heads of all cells are one dimension.
  last_row += last_in_row / (row / kNumber);
  if (task.transposed && last_in_row >= n_cells) return std::nullopt;
  if (last_row >= (task.transposed ? n_numbers : n_cells)) return std::nullopt;
  if (task.first_stream + task.n_streams > cache->ne[2]) return std::nullopt;
  task.n_cells = int64_t(task.transposed ? last_in_row : last_row) + 1;

  const size_t new_row = task.transposed ? task.n_cells * kNumber : row;
  const size_t new_stream = task.n_cells * n_numbers * kNumber;
  rows.bytes = task.n_streams * new_stream;
  rows.offset = begin / row * new_row + begin % row;
  for (int i = 0; i < GGML_MAX_DIMS; i++) {
    const size_t nb = view->nb[i];
    rows.nb[i] = nb % stream == 0 ? nb / stream * new_stream : nb % row == 0 ? nb / row * new_row : nb;
  }
  return rows;
}

ReadingNode::ReadingNode(const ggml_tensor* node) : tensor_(*node) {
  for (int i = 0; i < GGML_MAX_SRC; i++) {
    ggml_tensor* src = node->src[i];
    ManagedLayer* layer = src ? KvBuffer::layer_of(src) : nullptr;
    if (!layer) continue;
    const auto rows = rows_of_view(src);
    if (!rows) throw std::runtime_error("its view of the cache is laid out oddly");
    KvBuffer* buffer = KvBuffer::of(src);
    views_[i] = *src;
    views_[i].buffer = buffer->inner();
    views_[i].view_src = nullptr;
    views_[i].op = GGML_OP_NONE;
    std::fill(std::begin(views_[i].src), std::end(views_[i].src), nullptr);
    std::copy(std::begin(rows->nb), std::end(rows->nb), views_[i].nb);
    tensor_.src[i] = &views_[i];
    const auto same = std::find_if(sources_.begin(), sources_.end(), [&](const Source& other) {
      const ReadTask &a = other.rows.task, &b = rows->task;
      return other.layer == layer && a.kind == b.kind && a.first_stream == b.first_stream &&
             other.rows.bytes == rows->bytes;
    });
    if (same != sources_.end()) {
      sources_.push_back({i, buffer, layer, *rows, same->place, /*is_read=*/false});
      continue;
    }
    sources_.push_back({i, buffer, layer, *rows, bytes_});
    bytes_ += (rows->bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
}

void ReadingNode::place(uint8_t* memory) {
  for (Source& source : sources_) {
    source.rows.task.rows = reinterpret_cast<uint16_t*>(memory + source.place);
    views_[source.index].data = memory + source.place + source.rows.offset;
  }
}

BatchOfGraph::BatchOfGraph(const ggml_cgraph* graph) {
  for (int i = 0; i < graph->n_nodes; i++) {
    const ggml_tensor* node = graph->nodes[i];
    if (node->op == GGML_OP_FLASH_ATTN_EXT) {
      note_mask(node->src[3], node->src[1]);
    } else if (node->op == GGML_OP_SOFT_MAX) {
      note_mask(node->src[1], keys_of_scores(node->src[0]));
    } else if (node->op == GGML_OP_SET_ROWS) {
      Kind kind;
      const ManagedLayer* layer = KvBuffer::layer_of(node, &kind);
      if (layer && kind == Kind::key) n_tokens_[layer] = node->src[0]->ne[1];
    }
  }
}

void BatchOfGraph::note_mask(const ggml_tensor* mask, const ggml_tensor* keys) {
  std::set<const ggml_tensor*> seen;
  const ggml_tensor* input = mask ? input_of(mask, mask->ne[0], seen) : nullptr;
  if (!input) return;
  const ManagedLayer* layer = keys ? KvBuffer::layer_of(keys) : nullptr;
  masks_.push_back({input, layer, layer ? KvBuffer::of(keys) : nullptr});
  auto& copy = as_f16_[input];
  if (copy.empty()) copy = as_f16(input);
}

BatchSight BatchOfGraph::sight(const ManagedLayer& layer, const ReadTask& task) const {
  BatchSight sight;
  sight.n_streams = task.n_streams;
  sight.first_stream = task.first_stream;
  sight.n_cells = task.n_cells;
  const auto written = n_tokens_.find(&layer);
  sight.n_tokens = written == n_tokens_.end() ? 0 : written->second / task.n_streams;
  const auto fits = [&](const ggml_tensor* t) {
    return t->ne[0] == sight.n_cells && t->ne[1] == sight.n_tokens && t->ne[3] == sight.n_streams;
  };
  const KvBuffer* buffer = KvBuffer::of(layer.tensors[0]);
  for (const bool own : {true, false}) {  // llama.cpp makes one mask for all layers of a cache
    for (const Mask& mask : masks_) {
      if (sight.mask || !fits(mask.input) || (own ? mask.layer != &layer : mask.buffer != buffer)) continue;
      sight.mask = as_f16_.at(mask.input).data();
      sight.mask_token = size_t(sight.n_cells);
      sight.mask_stream = size_t(sight.n_cells * sight.n_tokens);
    }
  }
  return sight;
}

const ggml_tensor* queries_of(const ggml_tensor* node, const ReadTask& task, const BatchSight& sight) {
  const bool is_flash = node->op == GGML_OP_FLASH_ATTN_EXT;
  if (task.kind != Kind::key || (!is_flash && node->op != GGML_OP_MUL_MAT)) return nullptr;
  const ggml_tensor *q = node->src[is_flash ? 0 : 1], *keys = node->src[is_flash ? 1 : 0];
  const ManagedLayer* layer = KvBuffer::layer_of(keys);
  if (!layer || layer->index != task.layer || q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float)) return nullptr;
  const int64_t row_size = layer->tensors[0]->ne[0];
  const bool fits = row_size % q->ne[0] == 0 && q->ne[2] % (row_size / q->ne[0]) == 0 && q->ne[1] == sight.n_tokens &&
                    q->ne[3] == sight.n_streams;
  return fits ? q : nullptr;
}

BatchQueries copy_queries(const ggml_tensor* queries, std::vector<float>& memory) {
  const size_t dim = queries->ne[0];
  memory.clear();
  for (int64_t stream = 0; stream < queries->ne[3]; stream++) {
    for (int64_t token = 0; token < queries->ne[1]; token++) {
      for (int64_t head = 0; head < queries->ne[2]; head++) {
        const char* at = static_cast<const char*>(queries->data) + stream * queries->nb[3] + token * queries->nb[1] +
                         head * queries->nb[2];
        const float* numbers = reinterpret_cast<const float*>(at);
        memory.insert(memory.end(), numbers, numbers + dim);
      }
    }
  }
  const size_t n_heads = queries->ne[2];
  return {memory.data(), int(n_heads), int(dim), queries->ne[1], n_heads * dim, dim, queries->ne[1] * n_heads * dim};
}

}  // namespace thimble
