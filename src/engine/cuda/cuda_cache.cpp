// The tasks; cuda_cells.cpp has the rest.
#include "engine/cuda/cuda_cache.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <utility>

namespace thimble {
namespace {

CudaQueue& queue_of(const Lane& lane) {
  return static_cast<CudaQueue&>(*lane.queue);
}

bool is_prefill(const AttendTask& task) {
  return task.problem.n_tokens > cuda::kMaxTokens;
}

cuda::BatchMask mask_of(const BatchSight& sight) {
  return {sight.mask, sight.mask_token, sight.mask_stream, int(sight.n_tokens), sight.n_streams, int(sight.n_cells)};
}

}  // namespace

void CudaCache::add_layer(const LayerPlan& plan, const LayerCodecs& codecs, uint8_t* const memory[2]) {
  const std::string where = "layer " + std::to_string(plan.layer) + " on a CUDA device: ";
  require(cudaSetDevice(device_.ordinal), "CUDA device");
  if (layers_.empty()) {
    require(window_.init(plan.shape, window_size_), "memory of the window");
  } else if (plan.shape.cells_per_stream != window_.cells_per_stream() || plan.shape.n_streams != window_.n_streams()) {
    throw std::runtime_error(where + "layers of one cache must have the same cells");
  }
  auto layer = std::make_unique<Layer>();
  layer->top = plan.top;
  layer->drop_tail = plan.drop_tail;
  require(layer->device.init(plan.shape, codecs.of(Kind::key), codecs.of(Kind::value), window_.capacity(), memory,
                             plan.has_codes[int(Kind::value)]),
          where.c_str());
  if (const cuda::Status status = plan.top > 0 ? layer->device.add_store() : cuda::Status(); !status.ok()) {
    throw std::runtime_error(where + "no pinned RAM for its exact store (" + status.message +
                             "), which takes as much as an f16 cache: use a smaller context, a machine or a limit "
                             "(ulimit -l) with more of it, or leave top= out");
  }
  layers_[plan.layer] = std::move(layer);
}

std::string CudaCache::refusal(const WriteTask& task) const {
  if (!task.is_f16 && task.is_i64) return {};
  return "new keys and values must be f32 and their cells 64-bit numbers on a CUDA device";
}

std::string CudaCache::refusal(const AttendTask& task) const {
  const auto it = layers_.find(task.layer);
  const bool has_means = it != layers_.end() && it->second->device.codec(Kind::key).mean;
  if (has_means && (task.problem.softcap != 0 || task.has_sinks)) {
    // Both need q.mean, which the kernels leave out: softmax alone does not see it.
    return "this model has attention sinks or a softcap, which take a codec without means on a CUDA device: leave the "
           "profile out, or use device=CPU";
  }
  if (task.problem.n_cells % kBlockCells != 0) return "its cells are no multiple of 64";
  return {};
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
  cudaStream_t stream = queue_of(lane).stream();
  require(cuda::encode(device_, take_writes(of, stream), stream), "encoding");
}

void CudaCache::abandon() {
  for (auto& [index, layer] : layers_) layer->waits[0] = layer->waits[1] = false;
}

bool CudaCache::attend(const Lane& lane, const AttendTask& task, DenseAttention* dense) {
  CudaQueue& queue = queue_of(lane);
  Layer& of = layer(task.layer);
  cuda::EncodeArgs written = take_writes(of, queue.stream());
  if (is_prefill(task)) {
    prefill(queue, of, task, written, dense);
    return false;
  }
  attend_codes(queue, of, task, written);
  return true;
}

// Takes a batch's tokens into the window, and codes the cells that leave it, of all layers.
void CudaCache::begin_batch(const WriteTask& task, cudaStream_t stream) {
  std::set<int> head_dims;
  cuda::LeaveArgs leave;
  std::vector<cuda::EncodeArgs> layers;
  for (const auto& [index, layer] : layers_) {
    const cuda::DeviceLayer& device = layer->device;
    if (device.has_store()) continue;  // its tokens are coded as they come
    layers.push_back(device.encode_args(window_));
    leave.n_kv_heads = std::max(leave.n_kv_heads, device.shape().n_kv_heads);
    head_dims.insert(device.head_dim());
  }
  const size_t bytes = layers.size() * sizeof(layers[0]);
  if (std::exchange(n_leaving_, layers.size()) != layers.size()) {
    require(leaving_.emplace_back().reserve(bytes), "memory for the layers");
    require(cudaMemcpy(leaving_.back().as<void>(), layers.data(), bytes, cudaMemcpyHostToDevice), "the layers");
  }
  const int64_t* cells = static_cast<const int64_t*>(task.cells);
  const int n_tokens = int(task.n_rows);
  require(cuda::update_window(device_, window_.begin_batch(cells, n_tokens, mask_of(task.sight)), stream),
          "the window");
  if (layers.empty()) return;
  leave.layers = leaving_.back().as<cuda::EncodeArgs>();
  leave.n_layers = int(layers.size());
  leave.n_tokens = n_tokens;
  window_.fill(leave);
  for (int head_dim : head_dims) require(cuda::code_leaving(device_, leave, head_dim, stream), "encoding");
}

// What there is to encode; the window takes in the cells before the first layer's.
cuda::EncodeArgs CudaCache::take_writes(Layer& layer, cudaStream_t stream) {
  cuda::DeviceLayer& device = layer.device;
  cuda::EncodeArgs p = device.encode_args(window_);
  for (Kind kind : {Kind::key, Kind::value}) {
    if (!std::exchange(layer.waits[int(kind)], false)) continue;
    const WriteTask& write = layer.writes[int(kind)];
    p.n_tokens = int(write.n_rows);
    p.cells = static_cast<const int64_t*>(write.cells);
    (kind == Kind::key ? p.keys : p.values) = static_cast<const float*>(write.rows);
    (kind == Kind::key ? p.key_token_stride : p.value_token_stride) = write.row_bytes / sizeof(float);
    (kind == Kind::key ? p.key_head_stride : p.value_head_stride) = p.head_dim;
    uint64_t& batch = device.batch[int(kind)];
    if (batch == window_.batch()) {  // the first of this batch to be written
      if (p.n_tokens > cuda::kMaxTokens) require(window_.keep_cells(stream), "the window");
      begin_batch(write, stream);
    }
    batch = window_.batch();
  }
  return p;
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
  a.exact[0] = device.window_rows(window_, stream);
  if (p.keys && p.values && !device.has_store()) {
    a.fresh = cuda::new_rows(p, window_.tokens(stream));
    const size_t rows = size_t(stream) * p.n_kv_heads * p.window.capacity * p.head_dim;
    a.fresh.window_keys += rows;
    a.fresh.window_values += rows;
  } else {
    require(cuda::encode(device_, p, queue.stream()), "encoding");
  }
  a.hidden = window_.hidden(stream);
  a.hidden_stream_stride = window_.hidden_stride();
  a.output = problem.out;
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

// All cells' rows as they were before a batch whose tokens are not written yet, transformed as they are coded.
void CudaCache::decode(const Layer& layer, const cuda::DenseRows& rows, bool before_batch, cudaStream_t stream) {
  for (Kind kind : {Kind::key, Kind::value}) {
    cuda::DecodeArgs d;
    d.n_streams = rows.n_streams;
    d.n_kv_heads = layer.device.shape().n_kv_heads;
    d.n_cells = rows.n_cells;
    d.cache = layer.device.view(kind, rows.first_stream);
    d.codec = layer.device.codec(kind);
    d.is_key = kind == Kind::key;
    d.rows = kind == Kind::key ? rows.keys : rows.values;
    require(cuda::decode_cells(device_, d, stream), "decoding");
  }
  // The window's cells need not be coded. While new tokens' rows are not written, it holds those of before.
  cuda::EncodeArgs exact = layer.device.encode_args(window_);
  exact.from_window = true;
  exact.window_cells = before_batch ? window_.kept_cells() : window_.cells(0);
  exact.n_tokens = window_.n_streams() * exact.window.capacity;
  exact.dense = rows;
  require(cuda::encode(device_, exact, stream), "rows of the window");
}

// Many query tokens: all cells become f16 rows, and the flash attention of the program around does the rest. Without an
// exact store it is over transformed rows, and queries and outputs are transformed for it.
void CudaCache::prefill(CudaQueue& queue, Layer& layer, const AttendTask& task, cuda::EncodeArgs& p,
                        DenseAttention* dense) {
  const AttentionProblem& problem = task.problem;
  const cuda::DeviceLayer& device = layer.device;
  const int dim = p.head_dim;
  const size_t n_rows = size_t(problem.n_streams) * p.n_kv_heads * device.shape().cells_per_stream * dim;
  uint16_t* memory = queue.room<uint16_t>(queue.dense, 2 * n_rows);
  const cuda::DenseRows rows{memory, memory + n_rows, problem.first_stream, problem.n_streams, int(problem.n_cells)};
  *dense = {nullptr, rows.keys, rows.values, dim, p.n_kv_heads};
  if (device.has_store()) {
    require(cuda::encode(device_, p, queue.stream()), "encoding");
    return read_store(layer, rows, queue.stream());
  }
  decode(layer, rows, /*before_batch=*/p.n_tokens > 0, queue.stream());
  p.dense = rows;
  require(cuda::encode(device_, p, queue.stream()), "encoding");

  cuda::TransformArgs t;
  t.n_streams = problem.n_streams;
  t.n_tokens = problem.n_tokens;
  t.n_kv_heads = p.n_kv_heads;
  t.group = problem.n_heads / p.n_kv_heads;
  t.head_dim = dim;
  t.in = problem.q;
  t.token_stride = problem.q_token;
  t.head_stride = problem.q_head;
  t.stream_stride = problem.q_stream;
  t.codec = p.key_codec;
  t.out = queue.room<float>(queue.queries, size_t(problem.n_streams) * problem.n_tokens * problem.n_heads * dim);
  require(cuda::transform_rows(device_, t, queue.stream()), "queries");
  dense->q = t.out;
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
  t.add_mean = true;
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
