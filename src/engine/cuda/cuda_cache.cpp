// The tasks; cuda_prompt.cpp, cuda_reads.cpp, cuda_recorded.cpp and cuda_cells.cpp have the rest.
#include "engine/cuda/cuda_cache.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <utility>

namespace thimble {
namespace {

bool is_prefill(const AttendTask& task) {
  return task.problem.n_tokens > cuda::kMaxTokens;
}

// Whether dense attention must see what keys and values are with their means. A softmax alone sees no difference in
// keys, and of weights that sum up to 1 the values' mean can be added to the outputs.
bool needs_means(const AttentionProblem& problem) {
  return problem.softcap != 0 || problem.sinks;
}

// With an exact store, what matters most is retrieved, and cells are coded as they come: the window is the last ones
// alone, as on the CPU.
WindowSize window_size(const LayerPlan& plan) {
  WindowSize size = plan.window;
  if (plan.top > 0) size.spare = size.pool = 0;
  return size;
}

// Whether prompts give scores what they lack. A component of keys and queries carries it, and its own part is then
// missing from every score: on SmolLM2 a KL divergence of 0.006 to 0.009 at any rate. What it brings falls with the
// codes' error, from 0.06 at 1 bit to nothing at 2 (docs/experiments/quality.md).
bool corrects_prompts(const HeadCodec& keys) {
  return !keys.error.empty() && 2 * 8 * keys.format.n_width8 > keys.format.head_dim;
}

}  // namespace

bool CudaCache::fits(const LayerPlan& plan) const {
  const CacheShape& shape = plan.shape;
  return layers_.empty() || (shape.cells_per_stream == scratch_.shape().cells_per_stream &&
                             shape.n_streams == scratch_.shape().n_streams &&
                             cuda::DeviceWindow::rows_of_stream(plan.window, shape.cells_per_stream, shape.n_streams) ==
                                 scratch_.capacity());
}

void CudaCache::add_layer(const LayerPlan& plan, const LayerCodecs& codecs, uint8_t* const memory[2]) {
  const std::string where = "layer " + std::to_string(plan.layer) + " on a CUDA device: ";
  require(cudaSetDevice(device_.ordinal), "CUDA device");
  const CacheShape& shape = plan.shape;
  if (layers_.empty()) {
    const int rows = cuda::DeviceWindow::rows_of_stream(plan.window, shape.cells_per_stream, shape.n_streams);
    require(scratch_.init(shape, rows), "memory of the window");
  }
  auto layer = std::make_unique<Layer>();
  layer->number = plan.layer;
  layer->top = plan.top;
  layer->drop_tail = plan.drop_tail;
  layer->hashes = plan.hashes;
  layer->corrects_prompts = corrects_prompts(codecs.of(Kind::key).front());
  const cuda::AttendBy by = plan.as_rows
                                ? cuda::AttendBy::nothing
                                : cuda::attend_by(device_, plan.side(Kind::key), plan.side(Kind::value), plan.top > 0);
  require(layer->device.init(shape, codecs.of(Kind::key), codecs.of(Kind::value), window_size(plan),
                             scratch_.capacity(), memory, plan.has_codes[int(Kind::value)], by),
          where.c_str());
  if (const cuda::Status status = plan.top > 0 ? layer->device.add_store() : cuda::Status(); !status.ok()) {
    throw std::runtime_error(where + "no pinned RAM for its exact store (" + status.message +
                             "), which takes as much as an f16 cache: use a smaller context, a machine or a limit "
                             "(ulimit -l) with more of it, or leave top= out");
  }
  layers_[plan.layer] = std::move(layer);
}

void CudaCache::write(const Lane& lane, const WriteTask& task) {
  Layer& to = layer(task.layer);
  if (to.waits[int(task.kind)]) flush(lane, task.layer);
  to.writes[int(task.kind)] = task;
  to.waits[int(task.kind)] = true;
}

void CudaCache::flush(const Lane& lane, int index) {
  Layer& of = layer(index);
  if (!of.waits[0] && !of.waits[1]) return;
  CudaQueue& queue = queue_of(lane);
  if (of.device.is_read_as_rows()) return take_off(queue, of, {});
  const cuda::EncodeArgs written = take_writes(queue, of, {});
  if (is_staged(written)) return stage_alone(queue, of, written);
  encode(of, written, queue.stream());
}

void CudaCache::encode(const Layer& layer, const cuda::EncodeArgs& args, cudaStream_t stream) {
  require(
      layer.device.is_read_as_rows() ? cuda::encode_rows(device_, args, stream) : cuda::encode(device_, args, stream),
      "encoding");
}

void CudaCache::abandon() {
  flight_ = {};
  prompt_.n = 0;
  for (auto& [index, layer] : layers_) {
    layer->waits[0] = layer->waits[1] = false;
    layer->again = {};
  }
}

BatchQueries CudaCache::queries_of(const AttendTask& task) {
  const AttentionProblem& problem = task.problem;
  return {problem.q,       problem.n_heads, task.key_dim,    problem.n_tokens,
          problem.q_token, problem.q_head,  problem.q_stream};
}

bool CudaCache::attend(const Lane& lane, const AttendTask& task, DenseAttention* dense) {
  CudaQueue& queue = queue_of(lane);
  Layer& of = layer(task.layer);
  keep_queries(of, task.problem.n_heads);
  cuda::EncodeArgs written = take_writes(queue, of, queries_of(task));
  if (is_prefill(task)) {
    prefill(queue, of, task, written, dense);
    return false;
  }
  attend_codes(queue, of, task, written);
  return true;
}

// How many query heads a layer has is known when it is attended to.
void CudaCache::keep_queries(Layer& layer, int n_heads) {
  bool changed = false;
  require(layer.device.window().keep_queries(n_heads, &changed), "memory of the window");
  if (!changed || n_tables_ != layers_.size()) return;
  cuda::LayerWindow* windows = window_tables_.back().as<cuda::LayerWindow>();
  require(cudaMemcpy(windows + layer.index, &layer.device.window().view(), sizeof(*windows), cudaMemcpyHostToDevice),
          "the layers");
}

void CudaCache::make_tables() {
  if (std::exchange(n_tables_, layers_.size()) == layers_.size()) return;
  std::vector<cuda::EncodeArgs> layers;
  std::vector<cuda::LayerWindow> windows;
  for (const auto& [index, layer] : layers_) {
    layer->index = layers.size();
    windows.push_back(layer->device.window().view());
    layers.push_back(layer->device.encode_args());
    // With a store, tokens are coded as they come. Rows have a kernel of their own.
    if (layer->device.has_store() || layer->device.is_read_as_rows()) layers.back().head_dim = 0;
  }
  const auto upload = [](cuda::DeviceMemory& memory, const auto& table) {
    const size_t bytes = table.size() * sizeof(table[0]);
    require(memory.reserve(bytes), "memory for the layers");
    require(cudaMemcpy(memory.as<void>(), table.data(), bytes, cudaMemcpyHostToDevice), "the layers");
  };
  upload(tables_.emplace_back(), layers);
  upload(window_tables_.emplace_back(), windows);
}

// Of `n` layers from number `first` on.
cuda::LeaveArgs CudaCache::leaving(size_t first, size_t n, int n_tokens) const {
  cuda::LeaveArgs leave;
  leave.layers = tables_.back().as<cuda::EncodeArgs>() + first;
  leave.windows = window_tables_.back().as<cuda::LayerWindow>() + first;
  leave.n_layers = int(n);
  leave.n_tokens = n_tokens;
  for (const auto& [index, layer] : layers_) {
    if (layer->index < first || layer->index >= first + n) continue;
    leave.n_kv_heads = std::max(leave.n_kv_heads, layer->device.shape().n_kv_heads);
  }
  return leave;
}

void CudaCache::code_leaving(const cuda::LeaveArgs& leave, cudaStream_t stream) {
  const size_t first = size_t(leave.layers - tables_.back().as<cuda::EncodeArgs>());
  std::set<int> head_dims;
  for (const auto& [index, layer] : layers_) {
    const bool is_one = layer->index >= first && layer->index < first + leave.n_layers;
    if (!is_one || layer->device.has_store()) continue;
    if (!layer->device.is_read_as_rows()) {
      head_dims.insert(layer->device.head_dim());
    } else {
      require(cuda::code_leaving_rows(device_, layer->device.encode_args(), layer->device.window().view(),
                                      leave.n_tokens, stream),
              "encoding");
    }
  }
  for (int head_dim : head_dims) require(cuda::code_leaving(device_, leave, head_dim, stream), "encoding");
}

// Takes the tokens of a batch that is decoded into the windows of all layers, and codes the cells that leave them.
void CudaCache::update_windows(const WriteTask& task, const int64_t* cells, cudaStream_t stream) {
  cuda::WindowArgs args = scratch_.batch(cells, int(task.n_rows), mask_of(task.sight));
  args.layers = window_tables_.back().as<cuda::LayerWindow>();
  args.n_layers = int(layers_.size());
  require(cuda::update_window(device_, args, stream), "the window");
  code_leaving(leaving(0, layers_.size(), args.n_tokens), stream);
  for (auto& [index, layer] : layers_) layer->window_batch = batch_;
}

// The same of a prompt in one layer, whose queries decide at once what matters most.
void CudaCache::update_window(CudaQueue& queue, Layer& layer, const WriteTask& task, const cuda::EncodeArgs& p,
                              const BatchQueries& queries) {
  const cuda::BatchMask mask = mask_of(task.sight);
  const cudaStream_t stream = queue.stream();
  cuda::WindowArgs args = scratch_.batch(p.cells, int(task.n_rows), mask);
  args.layers = window_tables_.back().as<cuda::LayerWindow>() + layer.index;
  scratch_.add_prompt(&args);
  layer.window_batch = batch_;
  if (queries.data && p.keys && layer.device.window().is_judged()) {
    char* memory = queue.room<char>(queue.judge, scratch_.judge_bytes(mask.n_tokens));
    args.judge = scratch_.judge_list(mask.n_tokens, memory);
    args.part = cuda::WindowArgs::begin;
    require(cuda::update_window(device_, args, stream), "the window");
    require(cuda::judge_cells(device_, judge_args(layer, args, p, queries), stream), "the window");
    args.part = cuda::WindowArgs::end;
  }
  require(cuda::update_window(device_, args, stream), "the window");
  code_leaving(leaving(layer.index, 1, args.n_tokens), stream);
}

// `window`: of this layer alone.
cuda::JudgeArgs CudaCache::judge_args(const Layer& layer, const cuda::WindowArgs& window, const cuda::EncodeArgs& p,
                                      const BatchQueries& queries) const {
  cuda::JudgeArgs judge;
  judge.layers = window.layers;
  judge.list = window.judge;
  judge.n_streams = window.n_streams;
  judge.n_kv_heads = p.n_kv_heads;
  judge.group = queries.n_heads / p.n_kv_heads;
  judge.head_dim = p.head_dim;
  judge.capacity = window.capacity;
  judge.n_judges = window.n_judges;
  judge.keys = p.keys;
  judge.key_token_stride = p.key_token_stride;
  judge.key_head_stride = p.key_head_stride;
  judge.queries = queries.data;
  judge.query_stream_stride = queries.stream;
  judge.query_token_stride = queries.token;
  judge.query_head_stride = queries.head;
  const BatchSight& sight = layer.writes[int(Kind::key)].sight;
  judge.first_stream = sight.first_stream;
  judge.n_batch_streams = sight.n_streams;
  judge.stream_tokens = int(sight.n_tokens);
  return judge;
}

// What there is to encode; the window takes in the cells before.
cuda::EncodeArgs CudaCache::take_writes(CudaQueue& queue, Layer& layer, const BatchQueries& queries) {
  if (flight_.layer && flight_.layer != &layer) land(queue);
  cuda::EncodeArgs p = layer.device.encode_args();
  const WriteTask* last = nullptr;
  RecordedWrites taken{.layer = layer.number, .n_layers = layers_.size()};
  for (Kind kind : {Kind::key, Kind::value}) {
    if (!std::exchange(layer.waits[int(kind)], false)) continue;
    const WriteTask& write = layer.writes[int(kind)];
    last = &write;
    p.n_tokens = int(write.n_rows);
    if (write.stream_places == 0) p.cells = static_cast<const int64_t*>(write.cells);
    (kind == Kind::key ? p.keys : p.values) = static_cast<const float*>(write.rows);
    (kind == Kind::key ? p.key_token_stride : p.value_token_stride) = write.row_bytes / sizeof(float);
    (kind == Kind::key ? p.key_head_stride : p.value_head_stride) = layer.device.head_dim(kind);
    count_batch(layer, kind);
    taken.has[int(kind)] = true;
  }
  if (!last || p.n_tokens == 0) return p;
  // Transposed values go to places, which are those of the keys' cells.
  const bool has_keys = flight_.layer && flight_.batch == batch_;
  if (!p.cells && has_keys && flight_.args.n_tokens == p.n_tokens) p.cells = flight_.args.cells;
  if (!p.cells) throw std::runtime_error("values were written without keys of the same cells");
  make_tables();
  const bool is_prompt = p.n_tokens > cuda::kMaxTokens * last->sight.n_streams;
  taken.takes_batch = layer.window_batch != batch_;
  if (is_recording_) recorded_.push_back(taken);
  if (taken.takes_batch) {
    if (!is_prompt) {
      update_windows(*last, p.cells, queue.stream());
    } else if (!begin_prompt(queue, *last, p, queries)) {
      update_window(queue, layer, *last, p, queries);
    }
  }
  if (is_prompt && prompt_.batch != batch_) p.window.slots = scratch_.token_slots();
  return p;
}

// Attention reads new rows where the model wrote them, and ggml may have given that memory to its output. While all
// thread blocks run at once, each has read its rows long before the first one writes; else the rows, and the queries
// that will judge, are put where they belong before. Returns whether they were.
bool CudaCache::put_new_rows(CudaQueue& queue, const cuda::AttendArgs& a, const cuda::EncodeArgs& p,
                             const cuda::DeviceWindow& window, int first_stream) {
  const size_t n_outputs = size_t(a.n_streams) * a.n_tokens * a.n_kv_heads * a.group * a.head_dim;
  const auto overlaps = [&](const float* rows, size_t stride) {
    return rows < a.output + n_outputs && a.output < rows + size_t(p.n_tokens) * stride;
  };
  if (!overlaps(p.keys, p.key_token_stride) && !overlaps(p.values, p.value_token_stride)) return false;
  if (cuda::runs_at_once(device_, a)) return false;
  cuda::EncodeArgs rows = p;
  rows.key_cache = rows.value_cache = {};  // they are coded when they leave the window
  require(cuda::encode_rows(device_, rows, queue.stream()), "rows of the window");
  if (!window.is_judged()) return true;
  cuda::KeepQueriesArgs keep;
  keep.n_streams = a.n_streams;
  keep.n_tokens = a.n_tokens;
  keep.n_heads = a.n_kv_heads * a.group;
  keep.head_dim = a.head_dim;
  keep.queries = a.queries;
  keep.stream_stride = a.query_stream_stride;
  keep.token_stride = a.query_token_stride;
  keep.head_stride = a.query_head_stride;
  keep.n_judges = a.n_judges;
  keep.kept = a.kept_queries;
  keep.judges = window.judges(first_stream);
  require(cuda::keep_queries(device_, keep, queue.stream()), "queries");
  return true;
}

// New tokens wait for their coding until they leave the window: attention takes their rows into it. Where there is an
// exact store they are coded at once, by the kernel that puts their rows there, before retrieval looks for them.
void CudaCache::attend_codes(CudaQueue& queue, Layer& layer, const AttendTask& task, const cuda::EncodeArgs& p) {
  const AttentionProblem& problem = task.problem;
  cuda::DeviceLayer& device = layer.device;
  const int stream = problem.first_stream;

  cuda::AttendArgs a;
  a.n_streams = problem.n_streams;
  a.n_tokens = problem.n_tokens;
  a.n_kv_heads = p.n_kv_heads;
  a.group = problem.n_heads / p.n_kv_heads;
  a.head_dim = p.head_dim;
  a.n_cells = a.end_cell = int(problem.n_cells);
  a.queries = problem.q;
  a.query_token_stride = problem.q_token;
  a.query_head_stride = problem.q_head;
  a.query_stream_stride = problem.q_stream;
  a.scale = problem.scale;
  a.keys = device.view(Kind::key, stream);
  a.values = device.view(Kind::value, stream);
  a.key_codec = p.key_codec;
  a.value_codec = p.value_codec;
  a.mask = problem.mask;
  a.mask_token_stride = problem.mask_token;
  a.mask_stream_stride = problem.mask_stream;
  a.softcap = problem.softcap;
  a.slopes = slopes(queue, problem.max_bias, problem.n_heads);
  a.sinks = problem.sinks;
  a.output = problem.out;
  const cuda::DeviceWindow& window = device.window();
  a.exact[0] = device.window_rows(stream);
  if (window.is_judged()) {
    a.n_judges = window.n_judges();
    a.kept_queries = window.queries(stream);
  }
  if (p.keys && p.values && !device.has_store() && !put_new_rows(queue, a, p, window, stream)) {
    a.fresh = cuda::new_rows(p, window.tokens(stream));
    const size_t rows = size_t(stream) * p.n_kv_heads * p.window.capacity * p.head_dim;
    a.fresh.window_keys += rows;
    a.fresh.window_values += rows;
  } else if (device.has_store() || !p.keys || !p.values) {
    require(cuda::encode(device_, p, queue.stream()), "encoding");
  }
  a.hidden = window.hidden(stream);
  a.hidden_stream_stride = window.hidden_stride();
  if (layer.top > 0) return retrieve(queue, layer, stream, a);
  const size_t bytes = cuda::attend_workspace_bytes(device_, a);
  char* workspace = queue.room<char>(queue.workspace, bytes);
  require(cuda::attend(device_, a, workspace, bytes, queue.stream()), "attention");
}

void CudaCache::retrieve(CudaQueue& queue, Layer& layer, int first_stream, const cuda::AttendArgs& a) {
  const cuda::DenseRows store = layer.device.store_rows(first_stream);
  cuda::RetrieveArgs r;
  r.n_streams = a.n_streams;
  r.n_kv_heads = a.n_kv_heads;
  r.head_dim = a.head_dim;
  r.row_groups = cuda::row_groups(a.n_tokens, a.group);
  r.top = layer.top;
  r.store_keys = store.keys;
  r.store_values = store.values;
  r.store_cells = store.n_cells;
  r.n_cells = int(layer.device.shape().cells_per_stream);  // what it may grow to
  char* memory = queue.room<char>(queue.retrieval, cuda::retrieval_bytes(r));
  r.n_cells = a.n_cells;
  cuda::place_retrieval(memory, &r);
  const size_t bytes = cuda::attend_workspace_bytes(device_, cuda::with_retrieved(a, r, layer.drop_tail));
  char* workspace = queue.room<char>(queue.workspace, bytes);
  require(cuda::retrieve_step(device_, a, r, layer.drop_tail, workspace, bytes, queue.stream()), "attention");
}

// All cells' rows, from the exact store.
void CudaCache::read_store(const Layer& layer, const cuda::DenseRows& rows, cudaStream_t stream) {
  const cuda::DenseRows store = layer.device.store_rows(rows.first_stream);
  const size_t row = layer.device.head_dim() * sizeof(uint16_t), width = rows.n_cells * row;
  for (const auto& [to, from] : {std::pair{rows.keys, store.keys}, {rows.values, store.values}}) {
    require(cudaMemcpy2DAsync(to, width, from, store.n_cells * row, width,
                              size_t(rows.n_streams) * layer.device.shape().n_kv_heads, cudaMemcpyDefault, stream),
            "reading the exact store");
  }
}

// All coded cells' rows, by Kind as the model wrote them or transformed as they are coded.
void CudaCache::decode(const Layer& layer, const cuda::DenseRows& rows, const bool (&restored)[2],
                       cudaStream_t stream) {
  cuda::DecodeBothArgs both;
  for (Kind kind : {Kind::key, Kind::value}) {
    cuda::DecodeArgs& d = both.sides[int(kind)];
    d.n_streams = rows.n_streams;
    d.n_kv_heads = layer.device.shape().n_kv_heads;
    d.n_cells = rows.n_cells;
    d.cache = layer.device.view(kind, rows.first_stream);
    d.codec = layer.device.codec(kind);
    d.is_key = kind == Kind::key;
    d.rows = kind == Kind::key ? rows.keys : rows.values;
    d.shift = kind == Kind::key ? rows.key_shift : rows.value_shift;
    d.restored = restored[int(kind)];
  }
  require(cuda::decode_cells(device_, both, stream), "decoding");
}

// The window's cells need not be coded. While new tokens' rows are not written, it holds those of before.
void CudaCache::decode_window(const Layer& layer, const cuda::DenseRows& rows, bool before_batch, cudaStream_t stream) {
  cuda::EncodeArgs exact = layer.device.encode_args();
  exact.from_window = true;
  exact.window_cells = before_batch ? scratch_.kept_cells() : layer.device.window().cells(0);
  exact.n_tokens = layer.device.shape().n_streams * exact.window.capacity;
  exact.dense = rows;
  require(cuda::encode(device_, exact, stream), "rows of the window");
}

// The model's own memory of the new rows may be used for other things before the next attention over them.
void CudaCache::keep_for_others(CudaQueue& queue, Layer& layer, const cuda::EncodeArgs& written) {
  cuda::EncodeArgs& again = layer.again = written;
  again.key_cache = again.value_cache = {};
  again.window = {};
  const size_t n = size_t(written.n_tokens);
  const auto copy = [&](cuda::DeviceMemory& memory, const void* from, size_t row, size_t pitch) {
    char* to = queue.room<char>(memory, row * n);
    require(cudaMemcpy2DAsync(to, row, from, pitch, row, n, cudaMemcpyDefault, queue.stream()), "rows of the batch");
    return to;
  };
  for (Kind kind : {Kind::key, Kind::value}) {
    const float*& rows = kind == Kind::key ? again.keys : again.values;
    size_t& stride = kind == Kind::key ? again.key_token_stride : again.value_token_stride;
    const size_t numbers = layer.device.row_bytes(kind) / sizeof(uint16_t);
    const char* copied = copy(layer.again_memory[int(kind)], rows, numbers * sizeof(float), stride * sizeof(float));
    rows = reinterpret_cast<const float*>(copied);
    stride = numbers;
  }
  const char* cells = copy(layer.again_memory[2], again.cells, sizeof(int64_t), sizeof(int64_t));
  again.cells = reinterpret_cast<const int64_t*>(cells);
}

// Many query tokens: all cells become f16 rows, and the flash attention of the program around does the rest. Rotated
// ones are rotated back as they are decoded. Others stay transformed, and queries and outputs are transformed for them.
// Scores of coded cells get what they lack by a component of these where that pays.
void CudaCache::prefill(CudaQueue& queue, Layer& layer, const AttendTask& task, cuda::EncodeArgs& p,
                        DenseAttention* dense) {
  const AttentionProblem& problem = task.problem;
  const cuda::DeviceLayer& device = layer.device;
  const int dim = p.head_dim;
  const size_t n_rows = size_t(problem.n_streams) * p.n_kv_heads * device.shape().cells_per_stream * dim;
  uint16_t* memory = queue.room<uint16_t>(queue.dense, 2 * n_rows);
  cuda::DenseRows rows{memory, memory + n_rows, problem.first_stream, problem.n_streams, int(problem.n_cells)};
  *dense = {nullptr, rows.keys, rows.values, dim, p.n_kv_heads};
  if (device.has_store()) {
    require(cuda::encode(device_, p, queue.stream()), "encoding");
    dense->is_whole = true;
    return read_store(layer, rows, queue.stream());
  }
  const bool is_first = p.n_tokens > 0 && p.keys && p.values;
  if (is_first && !task.ends_batch) keep_for_others(queue, layer, p);
  // A part of the batch, or one that was staged before: it is taken in first, and then attended to as any other cells.
  if (is_staged(p) ? !(p.keys && p.values && layer.ended_batch != batch_) : prompt_.n > 0) {
    if (is_staged(p)) stage_alone(queue, layer, p);
    end_prompt(queue.stream());
    p.n_tokens = 0;
    p.keys = p.values = nullptr;
  }
  if (needs_means(problem)) {
    rows.key_shift = device.shift(Kind::key);
    rows.value_shift = device.shift(Kind::value);
  }
  const bool stages = is_staged(p) && p.keys && p.values;
  const bool restored[2] = {stages && !layer.corrects_prompts && cuda::can_restore(p.key_codec),
                            stages && cuda::can_restore(p.value_codec)};
  dense->is_whole = restored[int(Kind::value)];
  decode(layer, rows, restored, queue.stream());

  const size_t n_numbers = size_t(problem.n_streams) * problem.n_tokens * problem.n_heads * dim;
  const cuda::TransformArgs t{.n_streams = problem.n_streams,
                              .n_tokens = problem.n_tokens,
                              .n_kv_heads = p.n_kv_heads,
                              .group = problem.n_heads / p.n_kv_heads,
                              .head_dim = dim,
                              .in = problem.q,
                              .stream_stride = problem.q_stream,
                              .token_stride = problem.q_token,
                              .head_stride = problem.q_head,
                              .codec = p.key_codec,
                              .out = restored[int(Kind::key)] ? nullptr : queue.room<float>(queue.queries, n_numbers)};
  if (stages) {
    const bool is_judged = device.window().is_judged();
    // A layer may have more queries than was thought before it was attended to.
    if (is_judged &&
        size_t(problem.n_heads) * dim * prompt_.means.n_jobs * prompt_.mask.n_streams > prompt_.means.layer_stride) {
      end_prompt(queue.stream());
      place_means(queue, prompt_.args, prompt_.mask);
    }
    const size_t index = stage(layer, queue.stream());
    cuda::PromptArgs prompt = staging(index, p);
    prompt.batch.dense = rows;
    prompt.batch.window_cells = device.window().cells(0);
    prompt.first_window_row = rows.first_stream * scratch_.capacity();
    prompt.n_window_rows = rows.n_streams * scratch_.capacity();
    std::copy(std::begin(restored), std::end(restored), prompt.is_restored);
    if (!restored[int(Kind::key)]) prompt.queries = t;
    if (is_judged) {
      prompt.judge =
          judge_args(layer, cuda::WindowScratch::from_layer(prompt_.args, layer.index, 1), p, queries_of(task));
      prompt.judge.means = prompt_.means;
      prompt.judge.means.data += index * prompt_.means.layer_stride;
      prompt_.means.layers |= 1u << index;
    }
    // Beside the decoding. That began behind an event of ggml-cuda's stream, hence behind all that this one reads but
    // for what begins the batch or ends layers of it: such kernels, where there are any, are right before.
    prompt.early = std::exchange(prompt_.has_begun, true);
    require(cuda::prepare_prompt(device_, prompt, queue.stream()), "rows of a prompt");
  } else {
    decode_window(layer, rows, /*before_batch=*/p.n_tokens > 0, queue.stream());
    // The tokens of the batch attend to one another exactly, in each attention.
    const bool is_again = p.n_tokens == 0 && !is_first && layer.again.n_tokens > 0;
    if (is_again) p = layer.again;
    p.dense = rows;
    require(cuda::encode(device_, p, queue.stream()), "encoding");
    require(cuda::transform_rows(device_, t, queue.stream()), "queries");
  }
  if (task.ends_batch) layer.again = {};
  if (!restored[int(Kind::key)]) dense->q = t.out;
  if (!layer.corrects_prompts) return;
  cuda::BiasArgs bias;
  bias.codec = p.key_codec;
  bias.rows = rows;
  bias.rows_kv_heads = p.n_kv_heads;
  bias.group = t.group;
  bias.scale = problem.scale;
  bias.window_cells = is_first && p.n_tokens > 0 && !is_staged(p) ? scratch_.kept_cells() : device.window().cells(0);
  bias.n_window_streams = device.shape().n_streams;
  bias.capacity = scratch_.capacity();
  bias.cells = p.cells;
  bias.n_tokens = p.n_tokens;
  bias.cells_per_stream = p.cells_per_stream;
  bias.queries = t.out;
  bias.n_queries = problem.n_streams * problem.n_tokens;
  require(cuda::add_bias(device_, bias, queue.stream()), "scores");
}

void CudaCache::end_dense(const Lane& lane, const AttendTask& task) {
  const cuda::DeviceLayer& device = layer(task.layer).device;
  if (device.has_store()) return;
  const AttentionProblem& problem = task.problem;
  cuda::TransformArgs t;
  t.n_streams = problem.n_streams;
  t.n_tokens = problem.n_tokens;
  t.n_kv_heads = device.shape().n_kv_heads;
  t.group = problem.n_heads / t.n_kv_heads;
  t.head_dim = device.head_dim();
  t.in = t.out = problem.out;
  t.token_stride = problem.out_token;
  t.head_stride = problem.out_head;
  t.stream_stride = problem.out_stream;
  t.codec = device.codec(Kind::value);
  t.add_mean = !needs_means(problem);
  require(cuda::transform_rows(device_, t, queue_of(lane).stream()), "outputs");
}

const float* CudaCache::slopes(CudaQueue& queue, float max_bias, int n_heads) {
  if (max_bias <= 0) return nullptr;
  cuda::DeviceMemory& memory = slopes_[{max_bias, n_heads}];
  if (memory.size() > 0) return memory.as<float>();
  std::vector<float> values(n_heads);
  for (int head = 0; head < n_heads; head++) values[head] = alibi_slope(max_bias, n_heads, head);
  queue.room<float>(memory, values.size());
  require(cudaMemcpy(memory.as<float>(), values.data(), n_heads * sizeof(float), cudaMemcpyHostToDevice),
          "ALiBi slopes");
  return memory.as<float>();
}

}  // namespace thimble
