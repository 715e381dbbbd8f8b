#include "calibrate/graph_reader.h"

#include <ggml-backend.h>
#include <ggml.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "cache/cache_name.h"
#include "calibrate/norm_weights.h"
#include "codec/half.h"

namespace thimble {
namespace {

constexpr uint16_t kMasked = 0xfc00;  // -infinity
// A prompt's batch has more tokens than this; fewer may be drafts or answers (attention.h draws the line here, too).
constexpr int kFewTokens = 8;
// RoPE's parameters as ggml keeps them: whole numbers, then floats.
constexpr int kRopeInts = 5;

const ggml_tensor* root_of(const ggml_tensor* t) {
  while (t->view_src) t = t->view_src;
  return t;
}

/// A stream of a tensor as floats, [ne2][ne1][ne0], whatever its strides and wherever it lies.
std::vector<float> fetch(const ggml_tensor* t, int64_t stream = 0) {
  if (t->type != GGML_TYPE_F32 && t->type != GGML_TYPE_F16) {
    throw std::runtime_error("the model's keys and values are neither f32 nor f16: use cache type f16");
  }
  std::vector<float> out;
  if (ggml_nelements(t) == 0) return out;
  out.reserve(size_t(t->ne[0] * t->ne[1] * t->ne[2]));
  size_t size = ggml_type_size(t->type);
  for (int i = 0; i < 3; i++) size += size_t(t->ne[i] - 1) * t->nb[i];
  std::vector<uint8_t> bytes(size);
  ggml_backend_tensor_get(t, bytes.data(), size_t(stream) * t->nb[3], size);
  const auto copy = [&]<typename T>(T, auto to_float) {
    for (int64_t k = 0; k < t->ne[2]; k++) {
      for (int64_t j = 0; j < t->ne[1]; j++) {
        const uint8_t* row = &bytes[size_t(j) * t->nb[1] + size_t(k) * t->nb[2]];
        for (int64_t i = 0; i < t->ne[0]; i++) {
          T number;
          std::memcpy(&number, row + size_t(i) * t->nb[0], sizeof number);
          out.push_back(to_float(number));
        }
      }
    }
  };
  if (t->type == GGML_TYPE_F32) {
    copy(float{}, [](float x) { return x; });
  } else {
    copy(uint16_t{}, [](uint16_t x) { return half_to_float(x); });
  }
  return out;
}

/// A tensor of whole numbers, the first `n` of them.
std::vector<int64_t> fetch_numbers(const ggml_tensor* t, size_t n) {
  std::vector<int64_t> numbers(n);
  if (t->type == GGML_TYPE_I64) {
    ggml_backend_tensor_get(t, numbers.data(), 0, n * sizeof(int64_t));
  } else {
    std::vector<int32_t> narrow(n);
    ggml_backend_tensor_get(t, narrow.data(), 0, n * sizeof(int32_t));
    std::copy(narrow.begin(), narrow.end(), numbers.begin());
  }
  return numbers;
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
  int32_t ints[kRopeInts];
  float floats[6];  // base, scale, and YaRN's mix, magnitude, beta fast, beta slow
  std::memcpy(ints, node->op_params, sizeof ints);
  std::memcpy(floats, node->op_params + kRopeInts, sizeof floats);
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

/// What is measured of a node, as llama.cpp names them, and the layer that it belongs to, or -1.
std::pair<int, Collector::Power> power_of(const ggml_tensor* node) {
  int layer = -1;
  if (std::sscanf(node->name, "l_out-%d", &layer) == 1 && layer >= 0) return {layer, Collector::Power::residual};
  if ((layer = layer_of_output(node)) >= 0) return {layer, Collector::Power::output};
  if (std::sscanf(node->name, "attn_post_norm-%d", &layer) == 1 && layer >= 0 && node->op == GGML_OP_MUL &&
      node->src[0]->op == GGML_OP_RMS_NORM) {
    // Some models name so the norm of the residual stream: then no projection lies behind it.
    const ggml_tensor* x = node->src[0]->src[0];
    while (x->op == GGML_OP_GET_ROWS || x->op == GGML_OP_RESHAPE || x->op == GGML_OP_VIEW) x = x->src[0];
    if (layer_of_output(x) == layer) return {layer, Collector::Power::normalized};
  }
  return {-1, Collector::Power::residual};
}

std::vector<float> norms_of(const ggml_tensor* x) {
  bool unread =
      false;  // then the codec without calibration does not stretch keys, and nor does what stands for it here
  return norm_weights(x, &unread);
}

/// The cache that a node writes (SET_ROWS) or attends to (FLASH_ATTN_EXT); empty for other nodes.
std::optional<CacheName> cache_of(const ggml_tensor* node) {
  if (node->op == GGML_OP_SET_ROWS) return parse_cache_name(root_of(node)->name);
  if (node->op == GGML_OP_FLASH_ATTN_EXT) return parse_cache_name(root_of(node->src[1])->name);
  return std::nullopt;
}

/// Cells 0 to `last`.
std::vector<int> cells_to(int last) {
  std::vector<int> cells(size_t(last) + 1);
  std::iota(cells.begin(), cells.end(), 0);
  return cells;
}

/// The cell of the whole cache that is cell 0 for the tokens of one of the node's streams.
int64_t first_cell(const ggml_tensor* keys, int64_t stream) {
  const ggml_tensor* root = root_of(keys);
  return (int64_t(keys->view_offs / root->nb[2]) + stream) * root->ne[1];
}

}  // namespace

int layer_of_output(const ggml_tensor* node) {
  int layer = -1, parsed = 0;
  if (node->op != GGML_OP_MUL_MAT) return -1;
  return std::sscanf(node->src[0]->name, "blk.%d.attn_output.weight%n", &layer, &parsed) == 1 && parsed > 0 ? layer
                                                                                                            : -1;
}

void GraphReader::begin(int first_position, bool last, int n_tokens, int text_kind) {
  is_plain_ = has_runs_ = true;
  is_left_out_ = false;
  first_position_ = first_position;
  n_tokens_ += size_t(n_tokens);
  collector_.begin({{0, n_tokens, first_position, last ? Run::Ends::yes : Run::Ends::no, {}, -1, text_kind}});
}

void GraphReader::begin(const ggml_tensor* rope) {
  is_plain_ = has_runs_ = is_left_out_ = false;
  rope_ = rope;
  pending_.clear();  // of a graph that failed
  masks_.clear();
  for (auto& [buffer, cache] : caches_) cache.is_new_graph = true;
}

bool GraphReader::wants(const ggml_tensor* node) const {
  if (const int layer = power_of(node).first; layer >= 0 && layer < n_layers_) {
    return has_runs_ && !is_left_out_ && collector_.may_end();
  }
  const auto cache = cache_of(node);
  return cache && cache->layer < n_layers_;
}

void GraphReader::read(const ggml_tensor* node) {
  if (const auto cache = cache_of(node)) {
    node->op == GGML_OP_SET_ROWS ? stored(node, cache->layer, cache->kind) : attended(node, cache->layer);
  } else if (const auto [layer, what] = power_of(node); layer >= 0) {
    measured(node, layer, what);
  }
}

void GraphReader::stored(const ggml_tensor* node, int layer, Kind kind) {
  Pending& pending = pending_[layer];
  Rows& rows = kind == Kind::key ? pending.keys : pending.values;
  rows = {fetch(node->src[0]), {}};
  if (kind == Kind::value) return;
  if (!is_plain_) {
    rows.cells = fetch_numbers(node->src[1], size_t(node->src[0]->ne[1]));
    note_cells(node, rows.cells);
  }
  pending.key_norm = norms_of(node->src[0]);
  if (const ggml_tensor* rope = rope_behind(node->src[0])) pending.rope = rope_of(rope, pending.rope_shape);
}

GraphReader::Cache& GraphReader::cache_behind(const ggml_tensor* keys) {
  return caches_[root_of(keys)->buffer];
}

void GraphReader::note_cells(const ggml_tensor* keys, const std::vector<int64_t>& cells) {
  Cache& cache = cache_behind(keys);
  if (!std::exchange(cache.is_new_graph, false)) return;  // all layers of a cache write to the same cells
  const ggml_tensor* root = root_of(keys);
  cache.written.resize(std::max(cache.written.size(), size_t(root->ne[1] * root->ne[2])), 0);
  cache.before_graph = clock_;
  for (int64_t cell : cells) cache.written.at(size_t(cell)) = ++clock_;
}

const std::vector<uint16_t>& GraphReader::mask_of(const ggml_tensor* node) {
  const ggml_tensor* mask = node->src[3];
  if (!mask || mask->type != GGML_TYPE_F16 || !ggml_is_contiguous(mask)) {
    throw std::runtime_error("the model attends without a mask of type f16, so its sequences cannot be told apart");
  }
  const auto [at, is_new] = masks_.try_emplace(mask->data);
  if (is_new) {
    at->second.resize(size_t(ggml_nelements(mask)));
    ggml_backend_tensor_get(mask, at->second.data(), 0, ggml_nbytes(mask));
  }
  return at->second;
}

/// What a token sees: the mask's row over its stream's cells.
std::span<const uint16_t> GraphReader::mask_row(const ggml_tensor* node, int token) {
  const ggml_tensor* mask = node->src[3];
  const int64_t of_stream = node->src[0]->ne[1], stream = mask->ne[3] > 1 ? token / of_stream : 0;
  const size_t first = size_t((stream * mask->ne[1] + token % of_stream) * mask->ne[0]);
  return {mask_of(node).data() + first, size_t(node->src[1]->ne[1])};
}

/// The cells that a token sees, numbered in its stream, in the order in which they were written.
std::vector<int> GraphReader::seen_by(const ggml_tensor* node, int token) {
  const std::span<const uint16_t> row = mask_row(node, token);
  std::vector<int> cells;
  for (size_t i = 0; i < row.size(); i++) {
    if (row[i] != kMasked) cells.push_back(int(i));
  }
  const ggml_tensor* keys = node->src[1];
  const uint64_t* written = cache_behind(keys).written.data() + first_cell(keys, token / node->src[0]->ne[1]);
  const auto is_earlier = [&](int a, int b) { return written[a] < written[b]; };
  if (!std::is_sorted(cells.begin(), cells.end(), is_earlier)) std::stable_sort(cells.begin(), cells.end(), is_earlier);
  return cells;
}

/// Splits the batch into runs: a token goes on with the token before it where it has the next position and sees it.
std::vector<Run> GraphReader::find_runs(const ggml_tensor* node, const std::vector<int64_t>& cells) {
  const ggml_tensor* keys = node->src[1];
  const int of_stream = int(node->src[0]->ne[1]);
  const Cache& cache = cache_behind(keys);
  std::vector<int64_t> positions;
  if (rope_) positions = fetch_numbers(rope_->src[1], cells.size());
  std::vector<Run> runs;
  for (int t = 0; t < int(cells.size()); t++) {
    const int64_t base = first_cell(keys, t / of_stream);
    const std::span<const uint16_t> row = mask_row(node, t);
    if (!rope_) positions.push_back(int64_t(row.size()) - std::count(row.begin(), row.end(), kMasked) - 1);
    if (t % of_stream != 0 && positions[t] == positions[t - 1] + 1 && row[size_t(cells[t - 1] - base)] != kMasked) {
      runs.back().n_tokens++;
      runs.back().cells.push_back(cells[t]);
      continue;
    }
    Run run{t, 1, int(positions[t]), Run::Ends::no, {cells[t]}, -1};
    uint64_t latest = 0;
    for (size_t i = 0; i < row.size(); i++) {
      const uint64_t written = cache.written[size_t(base) + i];
      if (row[i] == kMasked || written <= latest || written > cache.before_graph) continue;
      latest = written;
      run.previous_cell = base + int64_t(i);
    }
    runs.push_back(std::move(run));
  }
  // Nothing is kept of the first positions of a sequence. A batch of no others is mostly a program's warm-up.
  std::erase_if(runs, [](const Run& run) { return run.first_position + run.n_tokens <= kSinks; });
  for (Run& run : runs) {
    if (run.n_tokens > kFewTokens) run.ends = Run::Ends::unknown;
  }
  return runs;
}

void GraphReader::measured(const ggml_tensor* node, int layer, Collector::Power what) {
  // llama.cpp computes the last layer's output only for the tokens that logits were asked for, which is enough here.
  if (!collector_.has(layer) || node->type != GGML_TYPE_F32 || !ggml_is_contiguous(node)) return;
  const std::vector<float> x = fetch(node);
  std::vector<double> squares;
  for (int64_t t = 0; t < node->ne[1]; t++) {
    double square = 0;
    for (int64_t i = 0; i < node->ne[0]; i++) square += std::pow(double(x[t * node->ne[0] + i]), 2);
    squares.push_back(square);
  }
  collector_.add_power(layer, what, squares, n_tokens_of_graph_);
}

void GraphReader::attended(const ggml_tensor* node, int layer) {
  const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2];
  const int of_stream = int(q->ne[1]), n_streams = int(q->ne[3]), n_tokens = of_stream * n_streams;
  LayerBatch batch;
  const LayerShape shape = batch.shape = {int(k->ne[2]), int(q->ne[2]), int(k->ne[0]), int(v->ne[0])};
  const auto found = pending_.find(layer);
  if (found == pending_.end()) return;  // this layer reads another layer's cache
  Pending& pending = found->second;
  if (pending.keys.values.size() != size_t(n_tokens) * shape.n_kv_heads * shape.key_dim ||
      pending.values.values.size() != size_t(n_tokens) * shape.n_kv_heads * shape.value_dim) {
    throw std::runtime_error("layer " + std::to_string(layer) +
                             " keeps its keys or values in a way that calibration "
                             "does not know: run with flash attention");
  }
  if (!std::exchange(has_runs_, true)) {
    std::vector<Run> runs = find_runs(node, pending.keys.cells);
    for (const Run& run : runs) n_tokens_ += size_t(run.n_tokens);
    is_left_out_ = runs.empty();
    if (!is_left_out_) collector_.begin(std::move(runs));
  }
  n_tokens_of_graph_ = n_tokens;
  if (is_left_out_) return;
  batch.rope = std::move(pending.rope);
  batch.rope_shape = pending.rope_shape;
  batch.key_norm = std::move(pending.key_norm);
  batch.query_norm = norms_of(q);
  std::memcpy(&batch.score_scale, node->op_params, sizeof batch.score_scale);
  std::vector<float> queries(size_t(n_tokens) * shape.n_heads * shape.key_dim);  // [token][n_heads][key_dim]
  for (int s = 0; s < n_streams; s++) {
    const std::vector<float> by_head = fetch(q, s);  // [n_heads][of_stream][key_dim]
    for (int h = 0; h < shape.n_heads; h++) {
      for (int t = 0; t < of_stream; t++) {
        std::copy_n(&by_head[(size_t(h) * of_stream + t) * shape.key_dim], shape.key_dim,
                    &queries[((size_t(s) * of_stream + t) * shape.n_heads + h) * shape.key_dim]);
      }
    }
  }
  batch.keys = pending.keys.values.data();
  batch.values = pending.values.values.data();
  batch.queries = queries.data();
  collector_.add(layer, batch);

  const std::vector<Run>& runs = collector_.runs();
  std::vector<float> keys;  // of one stream
  for (int i = 0, stream = -1; i < int(runs.size()); i++) {
    if (!Collector::may_end(runs[i])) continue;
    const int its_stream = runs[i].first_token / of_stream;
    if (std::exchange(stream, its_stream) != its_stream) keys = fetch(k, its_stream);
    CachedKeys cached;
    cached.keys = keys.data();
    cached.n_cells = int(k->ne[1]);
    cached.seen_by = [&](int token) { return is_plain_ ? cells_to(first_position_ + token) : seen_by(node, token); };
    collector_.add_attention(layer, size_t(i), queries.data(), cached);
  }
  pending_.erase(found);
}

}  // namespace thimble
