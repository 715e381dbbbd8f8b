#include "plugin/cuda_graph.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <set>
#include <stdexcept>
#include <utility>

#include "attention/attention.h"
#include "plugin/sight.h"

namespace thimble {
namespace {

constexpr size_t kSeenGraphs = 8;

void check(cudaError_t error, const char* what) {
  require(cuda::Status::from(error), what);
}

template <typename T>
T* data(const ggml_tensor* tensor) {
  return static_cast<T*>(tensor->data);
}

uint64_t hash_of(const ggml_cgraph* graph) {
  uint64_t hash = 0xcbf29ce484222325;
  const auto add = [&](const void* bytes, size_t size) {
    for (size_t i = 0; i + 8 <= size; i += 8) {
      uint64_t word;
      std::memcpy(&word, static_cast<const char*>(bytes) + i, 8);
      hash = (hash ^ word) * 0x100000001b3;
      hash ^= hash >> 29;
    }
  };
  for (int i = 0; i < graph->n_nodes; i++) {
    const ggml_tensor* node = graph->nodes[i];
    add(node, sizeof(*node));
    for (const ggml_tensor* src : node->src) {
      if (!src) continue;
      add(&src->data, sizeof(src->data));
      add(src->ne, sizeof(src->ne));
      add(src->nb, sizeof(src->nb));
    }
  }
  return hash;
}

bool is_prefill(const ggml_tensor* attend) {
  return attend->src[0]->ne[1] > cuda::kMaxTokens;
}

CudaCache& cache_of(const Cut& cut) {
  return static_cast<CudaCache&>(*cut.buffer->device_cache());
}

// A decode step over all layers of one cache: a replay leaves the books of whole batches only in order. The CUDA
// backend may wait on the host for a MUL_MAT_ID, which cannot be captured.
bool worth_capturing(const std::vector<Step>& steps) {
  std::set<const ManagedLayer*> written;
  const KvBuffer* buffer = nullptr;
  for (const auto& [inner, cut] : steps) {
    for (const ggml_tensor* node : inner) {
      if (node->op == GGML_OP_MUL_MAT_ID) return false;
    }
    if (!cut.layer) continue;
    if ((cut.attend && is_prefill(cut.attend)) || (buffer && cut.buffer != buffer)) return false;
    buffer = cut.buffer;
    if (cut.writes[0] && cut.writes[1]) written.insert(cut.layer);
  }
  // Whether a refused cell is seen can be told of one batch at a time only.
  return buffer && !buffer->has_refused() &&
         written.size() == static_cast<CudaCache&>(*buffer->device_cache()).n_layers();
}

void check_cut(const Cut& cut) {
  const DeviceCache& cache = cache_of(cut);
  for (const auto& [node, kind] : {std::pair{cut.shift, NodeKind::shift},
                                   {cut.attend, NodeKind::attend},
                                   {cut.writes[0], NodeKind::write},
                                   {cut.writes[1], NodeKind::write}}) {
    const std::string problem = node ? cache.problem(node, kind) : std::string();
    if (!problem.empty()) throw std::runtime_error(problem);
  }
  cut.buffer->use(cache.kernels());
}

int first_stream(const Cut& cut) {
  const ggml_tensor* k = cut.attend->src[1];
  return int(k->view_offs / root_of(k)->nb[2]);
}

}  // namespace

CudaGraph::CudaGraph(ggml_backend_t inner) : inner_(inner), device_(cuda_device(ggml_backend_get_device(inner))) {
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
  check(cudaEventCreateWithFlags(&ours_, cudaEventDisableTiming), "event");
  check(cudaEventCreateWithFlags(&theirs_, cudaEventDisableTiming), "event");
}

CudaGraph::~CudaGraph() {
  if (stream_) (void)cudaStreamSynchronize(stream_);
  forget_captures();
  if (ours_) (void)cudaEventDestroy(ours_);
  if (theirs_) (void)cudaEventDestroy(theirs_);
  if (stream_) (void)cudaStreamDestroy(stream_);
}

void CudaGraph::go_to_ours() {
  if (std::exchange(on_ours_, true)) return;
  ggml_backend_event event{ggml_backend_get_device(inner_), theirs_};
  ggml_backend_event_record(&event, inner_);
  check(cudaStreamWaitEvent(stream_, theirs_, 0), "event");
}

void CudaGraph::go_to_inner() {
  if (!std::exchange(on_ours_, false)) return;
  check(cudaEventRecord(ours_, stream_), "event");
  ggml_backend_event event{ggml_backend_get_device(inner_), ours_};
  ggml_backend_event_wait(inner_, &event);
}

CudaGraph::Seen& CudaGraph::find(const ggml_cgraph* graph) {
  clock_++;
  for (Seen& seen : seen_) {
    if (graph->uid != 0 && seen.uid == graph->uid) {
      seen.last_use = clock_;
      return seen;
    }
  }
  const uint64_t hash = hash_of(graph);
  auto it = std::find_if(seen_.begin(), seen_.end(), [&](const Seen& seen) { return seen.hash == hash; });
  if (it == seen_.end()) {
    if (seen_.size() < kSeenGraphs) {
      it = seen_.insert(it, Seen{});
    } else {
      it = std::min_element(seen_.begin(), seen_.end(),
                            [](const Seen& a, const Seen& b) { return a.last_use < b.last_use; });
      if (it->exec) (void)cudaGraphExecDestroy(it->exec);
      *it = {};
    }
  }
  it->uid = graph->uid;
  it->hash = hash;
  it->last_use = clock_;
  return *it;
}

void CudaGraph::forget_captures() {
  for (Seen& seen : seen_) {
    if (seen.exec) (void)cudaGraphExecDestroy(std::exchange(seen.exec, nullptr));
  }
}

void CudaGraph::replay(const Seen& seen) {
  go_to_ours();
  check(cudaGraphLaunch(seen.exec, stream_), "CUDA graph");
  go_to_inner();
}

void CudaGraph::capture(const std::vector<Step>& steps, ggml_cgraph* graph, Seen& seen) {
  go_to_ours();
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), "capture");
  cudaGraph_t captured = nullptr;
  capturing_ = true;
  std::string problem;
  try {
    run(steps, graph);
    go_to_ours();
  } catch (const std::exception& error) {
    problem = error.what();
  }
  capturing_ = on_ours_ = false;
  seen.buffer = nullptr;
  for (const Step& step : steps) {
    if (step.cut.layer) seen.buffer = step.cut.buffer;
  }
  cudaError_t status = cudaStreamEndCapture(stream_, &captured);
  if (status == cudaSuccess && problem.empty()) status = cudaGraphInstantiate(&seen.exec, captured, 0);
  if (captured) (void)cudaGraphDestroy(captured);
  if (status == cudaSuccess && problem.empty()) {
    GGML_LOG_DEBUG("thimble: a step of %d nodes and %zu cuts is a CUDA graph now\n", graph->n_nodes, steps.size());
    return;
  }
  seen.exec = nullptr;
  can_capture_ = false;
  (void)cudaGetLastError();
  GGML_LOG_WARN("thimble: no CUDA graph (%s): tokens take longer\n",
                problem.empty() ? cudaGetErrorString(status) : problem.c_str());
}

ggml_status CudaGraph::compute(ggml_cgraph* graph) {
  if (graph->n_nodes == 0) return GGML_STATUS_SUCCESS;
  check(cudaSetDevice(device_.ordinal), "CUDA device");
  on_ours_ = false;
  Seen& seen = find(graph);
  if (seen.exec) {
    seen.buffer->settle();
    if (!seen.buffer->has_refused()) {
      replay(seen);
      return GGML_STATUS_SUCCESS;
    }
  }
  const std::vector<Step> steps = plan_cuts(graph);
  if (std::none_of(steps.begin(), steps.end(), [](const Step& step) { return step.cut.layer; })) {
    return ggml_backend_graph_compute_async(inner_, graph);
  }
  for (const Step& step : steps) {
    if (!step.cut.layer) continue;
    step.cut.buffer->settle();
    check_cut(step.cut);
  }
  masks_.clear();
  if (seen.was_run && !seen.exec && can_capture_ && worth_capturing(steps)) {
    capture(steps, graph, seen);
    if (seen.exec) {
      replay(seen);
      return GGML_STATUS_SUCCESS;
    }
  }
  run(steps, graph);
  go_to_inner();
  seen.was_run = true;
  return GGML_STATUS_SUCCESS;
}

void CudaGraph::run(const std::vector<Step>& steps, ggml_cgraph* graph) {
  steps_ = &steps;
  for (const Step& step : steps) {
    if (!step.inner.empty()) run_inner(step.inner, graph);
    if (step.cut.layer) run_cut(step.cut);
  }
}

// The inner backend captures graphs of its own when their nodes come again, and tells graphs apart by their first node.
// While we capture it must not: then the first is one that never comes again.
void CudaGraph::run_inner(std::vector<ggml_tensor*> nodes, const ggml_cgraph* graph) {
  go_to_inner();
  if (capturing_) {
    marker_.op = GGML_OP_NONE;
    marker_.op_params[0]++;
    nodes.insert(nodes.begin(), &marker_);
  }
  ggml_cgraph part = *graph;
  part.uid = 0;
  part.nodes = nodes.data();
  part.n_nodes = int(nodes.size());
  part.size = 0;
  part.leafs = nullptr;
  part.n_leafs = 0;
  if (ggml_backend_graph_compute_async(inner_, &part) != GGML_STATUS_SUCCESS) {
    throw std::runtime_error("the inner CUDA backend failed");
  }
}

template <typename T>
T* CudaGraph::scratch(cuda::DeviceMemory& memory, size_t n) {
  bool moved = false;
  if (capturing_ && n * sizeof(T) > memory.size()) throw std::runtime_error("memory was not reserved");
  require(memory.reserve(n * sizeof(T), &moved), "scratch memory");
  if (moved) forget_captures();
  return memory.as<T>();
}

const float* CudaGraph::slopes(float max_bias, int n_heads) {
  if (max_bias <= 0) return nullptr;
  cuda::DeviceMemory& memory = slopes_[{max_bias, n_heads}];
  if (memory.size() > 0) return memory.as<float>();
  std::vector<float> values(n_heads);
  for (int head = 0; head < n_heads; head++) values[head] = alibi_slope(max_bias, n_heads, head);
  scratch<float>(memory, values.size());
  check(cudaMemcpy(memory.as<float>(), values.data(), n_heads * sizeof(float), cudaMemcpyHostToDevice), "ALiBi slopes");
  return memory.as<float>();
}

// What the tokens of the batch see: llama.cpp makes one mask for all layers of a cache.
cuda::BatchMask CudaGraph::mask_of_batch(const CudaCache& cache) const {
  for (const Step& step : *steps_) {
    const Cut& cut = step.cut;
    if (!cut.layer || !cut.attend || &cache_of(cut) != &cache) continue;
    const ggml_tensor *q = cut.attend->src[0], *mask = cut.attend->src[3];
    cuda::BatchMask batch;
    batch.n_tokens = int(q->ne[1]);
    batch.n_streams = int(q->ne[3]);
    batch.n_cells = int(cut.attend->src[1]->ne[1]);
    if (!mask) return batch;
    batch.data = data<uint16_t>(mask);
    batch.token_stride = mask->nb[1] / sizeof(uint16_t);
    batch.stream_stride = mask->ne[3] > 1 ? mask->nb[3] / sizeof(uint16_t) : 0;
    return batch;
  }
  throw std::runtime_error("cells are written in a graph that does not attend to them");
}

// What there is to encode; the window takes in the cells before the first layer's.
cuda::EncodeArgs CudaGraph::encode_args(const Cut& cut) {
  CudaCache& cache = cache_of(cut);
  cuda::DeviceLayer& layer = cache.layer(cut.layer->index);
  cuda::DeviceWindow& window = cache.window();
  cuda::EncodeArgs p = layer.encode_args(window);
  for (Kind kind : {Kind::key, Kind::value}) {
    const ggml_tensor* write = cut.writes[int(kind)];
    if (!write) continue;
    const ggml_tensor *rows = write->src[0], *cells = write->src[1];
    p.n_tokens = int(rows->ne[1]);
    p.cells = data<int64_t>(cells);
    (kind == Kind::key ? p.keys : p.values) = data<float>(rows);
    (kind == Kind::key ? p.key_token_stride : p.value_token_stride) = rows->nb[1] / sizeof(float);
    (kind == Kind::key ? p.key_head_stride : p.value_head_stride) = p.head_dim;
    uint64_t& batch = layer.batch[int(kind)];
    if (batch == window.batch()) {  // the first of this batch to be written
      if (p.n_tokens > cuda::kMaxTokens) require(window.keep_cells(stream_), "the window");
      cache.begin_batch(p.cells, p.n_tokens, mask_of_batch(cache), stream_);
    }
    batch = window.batch();
  }
  return p;
}

void CudaGraph::run_cut(const Cut& cut) {
  if (cut.shift) return shift(cut);
  go_to_ours();
  mind_refused(cut);
  cuda::EncodeArgs p = encode_args(cut);
  if (!cut.attend) {
    require(cuda::encode(device_, p, stream_), "encoding");
  } else if (is_prefill(cut.attend)) {
    prefill(cut, p);
  } else {
    attend(cut, p);
  }
}

// While cells of the layer hold rows that were refused: those that are written now are good again, and attention that
// would see others of them fails, as on the CPU. Only then does the host wait for cells and mask.
void CudaGraph::mind_refused(const Cut& cut) {
  if (cut.layer->refused[0].empty() && cut.layer->refused[1].empty()) return;
  check(cudaStreamSynchronize(stream_), "stream");
  for (Kind kind : {Kind::key, Kind::value}) {
    const ggml_tensor* write = cut.writes[int(kind)];
    if (!write) continue;
    std::vector<int64_t> cells(write->src[1]->ne[0]);
    check(cudaMemcpy(cells.data(), write->src[1]->data, cells.size() * sizeof(int64_t), cudaMemcpyDeviceToHost),
          "cells");
    for (int64_t cell : cells) cut.layer->refused[int(kind)].erase(cell);
  }
  if (!cut.attend) return;
  const ggml_tensor* mask = cut.attend->src[3];
  std::vector<uint8_t>* copy = nullptr;
  if (mask) {
    const auto [it, is_new] = masks_.try_emplace(mask->data);
    copy = &it->second;
    if (is_new) {
      copy->resize(ggml_nbytes(mask));
      check(cudaMemcpy(copy->data(), mask->data, copy->size(), cudaMemcpyDeviceToHost), "mask");
    }
  }
  if (sees_refused_cell(cut.attend, copy ? copy->data() : nullptr, *cut.layer)) {
    throw std::runtime_error(refused_cell_seen(*cut.layer));
  }
}

// Context shift: keys of cells whose position moves are decoded, rotated by the inner backend's ROPE and put back, some
// thousand cells at a time.
void CudaGraph::shift(const Cut& cut) {
  go_to_ours();
  check(cudaStreamSynchronize(stream_), "stream");
  const ggml_tensor *view = cut.shift->src[0], *by = cut.shift->src[1];
  std::vector<int32_t> shifts(by->ne[0]);
  check(cudaMemcpy(shifts.data(), by->data, shifts.size() * sizeof(int32_t), cudaMemcpyDeviceToHost), "positions");
  CudaCache& cache = cache_of(cut);
  const cuda::DeviceLayer& layer = cache.layer(cut.layer->index);
  const int64_t dim = layer.head_dim(), n_heads = layer.shape().n_kv_heads;
  const int64_t first_number = view->view_offs % root_of(view)->nb[1] / sizeof(uint16_t);  // rotated part of a head
  std::vector<int64_t> moved;
  for (int64_t cell = 0; cell < int64_t(shifts.size()); cell++) {
    if (shifts[cell] != 0) moved.push_back(cell);
  }
  for (size_t first = 0; first < moved.size(); first += cuda::CellState::kKeysAtOnce) {
    const std::vector<int64_t> cells(
        moved.begin() + first, moved.begin() + std::min<size_t>(moved.size(), first + cuda::CellState::kKeysAtOnce));
    std::vector<int32_t> positions;
    for (int64_t cell : cells) positions.push_back(shifts[cell]);
    int32_t* at = scratch<int32_t>(positions_, positions.size());
    check(cudaMemcpy(at, positions.data(), positions.size() * sizeof(int32_t), cudaMemcpyHostToDevice), "positions");
    float* keys = cache.read_keys(cut.layer->index, cells);

    const auto stand_in = [&](int i, void* data, ggml_type type, std::array<int64_t, 4> ne, size_t row) {
      ggml_tensor& tensor = stand_ins_[i];
      tensor = {};
      tensor.type = type;
      tensor.buffer = cut.buffer->inner();
      tensor.data = data;
      std::copy(ne.begin(), ne.end(), tensor.ne);
      tensor.nb[0] = ggml_type_size(type);
      tensor.nb[1] = row;
      tensor.nb[2] = n_heads * row;
      tensor.nb[3] = ne[2] * tensor.nb[2];
      return &tensor;
    };
    const int64_t n = int64_t(cells.size());
    const std::array<int64_t, 4> shape = {view->ne[0], n_heads, n, 1};
    ggml_tensor* from = stand_in(1, keys + first_number, GGML_TYPE_F32, shape, dim * sizeof(float));
    ggml_tensor* rotate = stand_in(0, from->data, GGML_TYPE_F32, shape, dim * sizeof(float));
    rotate->op = GGML_OP_ROPE;
    rotate->flags = cut.shift->flags;
    std::copy(std::begin(cut.shift->op_params), std::end(cut.shift->op_params), rotate->op_params);
    rotate->src[0] = from;
    rotate->src[1] = stand_in(2, at, GGML_TYPE_I32, {n, 1, 1, 1}, n * sizeof(int32_t));
    rotate->src[2] = cut.shift->src[2];
    ggml_cgraph whole{};
    run_inner({rotate}, &whole);
    go_to_ours();
    cache.write_keys(cut.layer->index, cells);  // waits for all of the device
  }
}

// New tokens wait for their coding until they leave the window: attention takes their rows into it. Where there is an
// exact store they are coded at once, by the kernel that puts their rows there, before retrieval looks for them.
void CudaGraph::attend(const Cut& cut, const cuda::EncodeArgs& p) {
  const ggml_tensor *q = cut.attend->src[0], *k = cut.attend->src[1], *mask = cut.attend->src[3];
  const auto [scale, max_bias, softcap] = attention_parameters(cut.attend);
  CudaCache& cache = cache_of(cut);
  cuda::DeviceLayer& layer = cache.layer(cut.layer->index);
  const cuda::DeviceWindow& window = cache.window();
  const int n_heads = int(q->ne[2]), stream = first_stream(cut);

  cuda::AttendArgs a;
  a.n_streams = int(q->ne[3]);
  a.n_tokens = int(q->ne[1]);
  a.n_kv_heads = p.n_kv_heads;
  a.group = n_heads / p.n_kv_heads;
  a.head_dim = p.head_dim;
  a.n_cells = a.end_cell = int(k->ne[1]);
  a.queries = data<float>(q);
  a.query_token_stride = q->nb[1] / sizeof(float);
  a.query_head_stride = q->nb[2] / sizeof(float);
  a.query_stream_stride = q->nb[3] / sizeof(float);
  a.scale = scale;
  a.keys = layer.view(Kind::key, stream);
  a.values = layer.view(Kind::value, stream);
  a.key_codec = p.key_codec;
  a.value_codec = p.value_codec;
  if (mask) {
    a.mask = data<uint16_t>(mask);
    a.mask_token_stride = mask->nb[1] / sizeof(uint16_t);
    a.mask_stream_stride = mask->ne[3] > 1 ? mask->nb[3] / sizeof(uint16_t) : 0;
  }
  a.softcap = softcap;
  a.slopes = slopes(max_bias, n_heads);
  a.sinks = cut.attend->src[4] ? data<float>(cut.attend->src[4]) : nullptr;
  a.exact[0] = layer.window_rows(window, stream);
  if (p.keys && p.values && !layer.has_store()) {
    a.fresh = {p.keys,
               p.values,
               p.key_token_stride,
               p.key_head_stride,
               p.value_token_stride,
               p.value_head_stride,
               window.tokens(stream),
               p.window.keys,
               p.window.values};
    const size_t rows = size_t(stream) * p.n_kv_heads * p.window.capacity * p.head_dim;
    a.fresh.window_keys += rows;
    a.fresh.window_values += rows;
  } else {
    require(cuda::encode(device_, p, stream_), "encoding");
  }
  a.hidden = window.hidden(stream);
  a.hidden_stream_stride = window.hidden_stride();
  a.output = data<float>(cut.attend);
  if (cut.layer->top > 0) return retrieve(cut, a);
  const size_t bytes = cuda::attend_workspace_bytes(device_, a);
  char* workspace = scratch<char>(workspace_, bytes);
  require(cuda::attend(device_, a, workspace, bytes, stream_), "attention");
}

void CudaGraph::retrieve(const Cut& cut, const cuda::AttendArgs& a) {
  const cuda::DeviceLayer& layer = cache_of(cut).layer(cut.layer->index);
  const cuda::DenseRows store = layer.store_rows(first_stream(cut));
  cuda::RetrieveArgs r;
  r.n_streams = a.n_streams;
  r.n_kv_heads = a.n_kv_heads;
  r.head_dim = a.head_dim;
  r.row_groups = cuda::row_groups(a.n_tokens, a.group);
  r.top = cut.layer->top;
  r.store_keys = store.keys;
  r.store_values = store.values;
  r.store_cells = store.n_cells;
  r.n_cells = int(layer.shape().cells_per_stream);  // what it may grow to
  char* memory = scratch<char>(retrieval_, cuda::retrieval_bytes(r));
  r.n_cells = a.n_cells;
  cuda::place_retrieval(memory, &r);
  const bool drop_tail = cut.layer->drop_tail;
  const size_t bytes = cuda::attend_workspace_bytes(device_, cuda::with_retrieved(a, r, drop_tail));
  char* workspace = scratch<char>(workspace_, bytes);
  require(cuda::retrieve_step(device_, a, r, drop_tail, workspace, bytes, stream_), "attention");
}

// All cells' rows, from the exact store.
void CudaGraph::read_store(const Cut& cut, const cuda::DenseRows& rows) {
  const cuda::DeviceLayer& layer = cache_of(cut).layer(cut.layer->index);
  const cuda::DenseRows store = layer.store_rows(rows.first_stream);
  const size_t row = layer.head_dim() * sizeof(uint16_t), width = rows.n_cells * row;
  for (const auto& [to, from] : {std::pair{rows.keys, store.keys}, {rows.values, store.values}}) {
    check(cudaMemcpy2DAsync(to, width, from, store.n_cells * row, width,
                            size_t(rows.n_streams) * layer.shape().n_kv_heads, cudaMemcpyDefault, stream_),
          "reading the exact store");
  }
}

// All cells' rows as they were before a batch whose tokens are not written yet, transformed as they are coded.
void CudaGraph::decode(const Cut& cut, const cuda::DenseRows& rows, bool before_batch) {
  CudaCache& cache = cache_of(cut);
  cuda::DeviceLayer& layer = cache.layer(cut.layer->index);
  for (Kind kind : {Kind::key, Kind::value}) {
    cuda::DecodeArgs d;
    d.n_streams = rows.n_streams;
    d.n_kv_heads = layer.shape().n_kv_heads;
    d.n_cells = rows.n_cells;
    d.cache = layer.view(kind, rows.first_stream);
    d.codec = layer.codec(kind);
    d.is_key = kind == Kind::key;
    d.rows = kind == Kind::key ? rows.keys : rows.values;
    require(cuda::decode_cells(device_, d, stream_), "decoding");
  }
  // The window's cells need not be coded. While new tokens' rows are not written, it holds those of before.
  cuda::EncodeArgs exact = layer.encode_args(cache.window());
  exact.from_window = true;
  exact.window_cells = before_batch ? cache.window().kept_cells() : cache.window().cells(0);
  exact.n_tokens = cache.window().n_streams() * exact.window.capacity;
  exact.dense = rows;
  require(cuda::encode(device_, exact, stream_), "rows of the window");
}

// Many query tokens: all cells become f16 rows, and the inner backend's flash attention does the rest. Without an exact
// store it is over transformed rows, and queries and outputs are transformed for it.
void CudaGraph::prefill(const Cut& cut, cuda::EncodeArgs& p) {
  const ggml_tensor *q = cut.attend->src[0], *k = cut.attend->src[1];
  const cuda::DeviceLayer& layer = cache_of(cut).layer(cut.layer->index);
  const int n_streams = int(q->ne[3]), n_tokens = int(q->ne[1]), n_heads = int(q->ne[2]), n_cells = int(k->ne[1]);
  const int dim = p.head_dim;
  const size_t n_rows = size_t(n_streams) * p.n_kv_heads * layer.shape().cells_per_stream * dim;
  uint16_t* dense = scratch<uint16_t>(dense_, 2 * n_rows);
  const cuda::DenseRows rows{dense, dense + n_rows, first_stream(cut), n_streams, n_cells};
  const bool is_transformed = !layer.has_store();
  if (is_transformed) {
    decode(cut, rows, /*before_batch=*/p.n_tokens > 0);
    p.dense = rows;
  }
  require(cuda::encode(device_, p, stream_), "encoding");
  if (!is_transformed) read_store(cut, rows);

  cuda::TransformArgs t;
  t.n_streams = n_streams;
  t.n_tokens = n_tokens;
  t.n_kv_heads = p.n_kv_heads;
  t.group = n_heads / p.n_kv_heads;
  t.head_dim = dim;
  t.in = data<float>(q);
  t.token_stride = q->nb[1] / sizeof(float);
  t.head_stride = q->nb[2] / sizeof(float);
  t.stream_stride = q->nb[3] / sizeof(float);
  t.codec = p.key_codec;
  if (is_transformed) {
    t.out = scratch<float>(queries_, size_t(n_streams) * n_tokens * n_heads * dim);
    require(cuda::transform_rows(device_, t, stream_), "queries");
  }

  const auto stand_in = [&](int i, void* data, ggml_type type, std::array<int64_t, 4> ne, std::array<size_t, 3> nb) {
    ggml_tensor& tensor = stand_ins_[i];
    tensor = {};
    tensor.type = type;
    tensor.buffer = cut.buffer->inner();
    tensor.data = data;
    std::copy(ne.begin(), ne.end(), tensor.ne);
    tensor.nb[0] = ggml_type_size(type);
    std::copy(nb.begin(), nb.end(), tensor.nb + 1);
    return &tensor;
  };
  const size_t row = dim * sizeof(float), cell = dim * sizeof(uint16_t), head = n_cells * cell;
  ggml_tensor& node = stand_ins_[0] = *cut.attend;
  if (is_transformed) {
    node.src[0] = stand_in(1, t.out, GGML_TYPE_F32, {dim, n_tokens, n_heads, n_streams},
                           {n_heads * row, row, n_tokens * n_heads * row});
  }
  for (int i = 0; i < 2; i++) {
    node.src[1 + i] = stand_in(2 + i, i == 0 ? rows.keys : rows.values, GGML_TYPE_F16,
                               {dim, n_cells, p.n_kv_heads, n_streams}, {cell, head, p.n_kv_heads * head});
  }
  ggml_cgraph whole{};
  run_inner({&node}, &whole);
  if (!is_transformed) return;

  go_to_ours();
  t.in = t.out = data<float>(cut.attend);
  t.head_stride = dim;
  t.token_stride = size_t(n_heads) * dim;
  t.stream_stride = n_tokens * t.token_stride;
  t.codec = p.value_codec;
  t.add_mean = true;
  require(cuda::transform_rows(device_, t, stream_), "outputs");
}

}  // namespace thimble
