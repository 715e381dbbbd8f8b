#include "plugin/stream_runner.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <span>
#include <stdexcept>
#include <utility>

#include "kernels/kernels.h"
#include "plugin/ggml_api.h"
#include "plugin/nodes.h"
#include "plugin/shift.h"

namespace thimble {
namespace {

// How many graphs are remembered: the last 8, and more while all of them have few nodes. A token's graph has about 30
// nodes a layer. Where tensors are split over devices it comes in two pieces a layer.
constexpr size_t kSeenGraphs = 8, kSeenNodes = 16384;

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

// True for a decode step over layers of one cache. Prompts, whose attention the inner backend does itself, are not
// worth recording, as their graphs do not come again.
bool worth_recording(const std::vector<Step>& steps) {
  KvBuffer* buffer = nullptr;
  for (const auto& [inner, cut] : steps) {
    if (!cut.layer) continue;
    if (cut.read || cut.shift) return false;
    if ((cut.attend && cut.attend->src[0]->ne[1] > kMaxCodeTokens) || (buffer && cut.buffer != buffer)) return false;
    buffer = cut.buffer;
  }
  // While there are refused cells, each batch must be checked for seeing one, so it cannot be replayed.
  return buffer && !buffer->has_refused() && buffer->cache().can_record();
}

// Throws where the engine cannot run a node. Called before any node of the graph runs.
void check_cut(const Cut& cut) {
  for (const auto& [node, kind] : {std::pair{cut.shift, NodeKind::shift},
                                   {cut.attend, NodeKind::attend},
                                   {cut.read, NodeKind::read},
                                   {cut.writes[0], NodeKind::write},
                                   {cut.writes[1], NodeKind::write}}) {
    const std::string why = node ? refusal(node, kind) : std::string();
    if (!why.empty()) throw std::runtime_error(why);
  }
}

// The first node for which the inner backend makes the host wait, or null.
const ggml_tensor* first_wait(const std::vector<Step>& steps, const InnerBuild& build) {
  for (const Step& step : steps) {
    const auto it = std::find_if(step.inner.begin(), step.inner.end(),
                                 [&](const ggml_tensor* node) { return host_waits(node, build); });
    if (it != step.inner.end()) return *it;
  }
  return nullptr;
}

// Whether no cut behind this one attends to a layer or reads it: layers of a model may share a cache.
bool is_last_use(const std::vector<Step>& steps, const Cut& cut, const ManagedLayer* layer) {
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    if (&step->cut == &cut) return true;
    if (step->cut.attend && step->cut.layer == layer) return false;
    for (const ggml_tensor* view : step->cut.read ? std::span(step->cut.read->src) : std::span<ggml_tensor* const>()) {
      if (view && KvBuffer::layer_of(view) == layer) return false;
    }
  }
  return true;
}

// What the inner backend says of itself, or null.
const ggml_backend_feature* features_of(ggml_backend_t inner) {
  ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(ggml_backend_get_device(inner));
  const auto get = reinterpret_cast<ggml_backend_get_features_t>(
      ggml_backend_reg_get_proc_address(registry, "ggml_backend_get_features"));
  return get ? get(registry) : nullptr;
}

}  // namespace

StreamRunner::StreamRunner(ggml_backend_t inner, std::unique_ptr<Queue> queue)
    : inner_(inner),
      queue_(std::move(queue)),
      inner_build_(inner_build(features_of(inner), queue_->architecture(), ggml_version())),
      can_record_(inner->iface.event_record != nullptr) {}

StreamRunner::~StreamRunner() {
  try {
    queue_->synchronize();
  } catch (const std::exception&) {
    // The device has failed before, and that was reported.
  }
}

void StreamRunner::go_to_ours() {
  if (std::exchange(on_ours_, true)) return;
  if (!inner_->iface.event_record) return ggml_backend_synchronize(inner_);
  ggml_backend_event event{ggml_backend_get_device(inner_), queue_->theirs()};
  ggml_backend_event_record(&event, inner_);
  queue_->await_theirs();
}

void StreamRunner::go_to_inner() {
  if (!std::exchange(on_ours_, false)) return;
  if (!inner_->iface.event_wait) return queue_->synchronize();
  ggml_backend_event event{ggml_backend_get_device(inner_), queue_->record_ours()};
  ggml_backend_event_wait(inner_, &event);
}

StreamRunner::Seen& StreamRunner::find(const ggml_cgraph* graph) {
  auto it = std::find_if(seen_.begin(), seen_.end(),
                         [&](const Seen& seen) { return graph->uid != 0 && seen.uid == graph->uid; });
  if (it == seen_.end()) {
    const uint64_t hash = hash_of(graph);
    it = std::find_if(seen_.begin(), seen_.end(), [&](const Seen& seen) { return seen.hash == hash; });
    if (it == seen_.end()) {
      it = seen_.insert(it, Seen{});
      it->n_nodes = size_t(graph->n_nodes);
      seen_nodes_ += it->n_nodes;
    }
    it->uid = graph->uid;
    it->hash = hash;
    it->has_no_cache = false;
  }
  seen_.splice(seen_.begin(), seen_, it);
  while (seen_.size() > kSeenGraphs && seen_nodes_ > kSeenNodes) {
    seen_nodes_ -= seen_.back().n_nodes;
    seen_.pop_back();
  }
  return seen_.front();
}

// Drops recordings if memory that they use was moved.
void StreamRunner::drop_stale_recordings() {
  if (std::exchange(memory_version_, queue_->memory_version()) == queue_->memory_version()) return;
  for (Seen& seen : seen_) seen.recording.reset();
}

// False where the graph must be run: it has no recording, or not one of what is to be done now.
bool StreamRunner::replay(Seen& seen) {
  if (!seen.recording) return false;
  seen.buffer->settle();
  if (seen.buffer->has_refused() || !seen.buffer->cache().take_recorded(seen.writes)) return false;
  run_recorded(seen);
  return true;
}

void StreamRunner::run_recorded(const Seen& seen) {
  go_to_ours();
  seen.recording->replay();
  go_to_inner();
}

// Whether a step that is worth recording can be.
bool StreamRunner::can_record(const std::vector<Step>& steps) {
  if (!can_record_) return false;
  const ggml_tensor* wait = first_wait(steps, inner_build_);
  if (wait && !std::exchange(said_host_waits_, true)) {
    GGML_LOG_WARN(
        "thimble: a token's graph cannot be recorded, so tokens take longer: for %s (%s, experts of type %s), "
        "ggml-cuda makes the host wait, or this build of it (ggml %s) is not known to do without\n",
        ggml_op_name(wait->op), wait->name, ggml_type_name(wait->src[0]->type), ggml_version());
  }
  return !wait;
}

void StreamRunner::record(const std::vector<Step>& steps, ggml_cgraph* graph, Seen& seen) {
  for (const Step& step : steps) {
    if (step.cut.layer) seen.buffer = step.cut.buffer;
  }
  KvCache& cache = seen.buffer->cache();
  go_to_ours();
  cache.begin_recording();
  queue_->begin_recording();
  recording_ = true;
  std::string problem;
  try {
    run(steps, graph);
    go_to_ours();
  } catch (const std::exception& error) {
    problem = error.what();
  }
  recording_ = on_ours_ = false;
  std::string why;
  seen.recording = queue_->end_recording(&why);
  if (!problem.empty()) {
    cache.abandon();
    seen.recording.reset();
    why = problem;
  }
  seen.writes = cache.end_recording(seen.recording != nullptr);
  if (seen.recording) {
    GGML_LOG_DEBUG("thimble: a step of %d nodes and %zu cuts is recorded now\n", graph->n_nodes, steps.size());
    return;
  }
  can_record_ = false;
  GGML_LOG_WARN("thimble: a token's graph could not be recorded (%s): tokens take longer\n", why.c_str());
}

ggml_status StreamRunner::compute(ggml_cgraph* graph) {
  if (graph->n_nodes == 0) return GGML_STATUS_SUCCESS;
  queue_->make_current();
  on_ours_ = false;
  take_far_caches(graph);
  drop_stale_recordings();
  Seen& seen = find(graph);
  if (seen.has_no_cache) return ggml_backend_graph_compute_async(inner_, graph);
  if (replay(seen)) return GGML_STATUS_SUCCESS;
  for (int i = 0; i < graph->n_nodes; i++) {
    KvBuffer::hand_over(graph->nodes[i]);
    for (ggml_tensor* src : graph->nodes[i]->src) {
      if (src) KvBuffer::hand_over(src);
    }
  }
  const std::vector<Step> steps = plan_cuts(graph);
  if (std::none_of(steps.begin(), steps.end(), [](const Step& step) { return step.cut.layer; })) {
    seen.has_no_cache = graph->uid != 0;  // which ggml gives to this graph alone
    return ggml_backend_graph_compute_async(inner_, graph);
  }
  for (const Step& step : steps) {
    if (!step.cut.layer) continue;
    step.cut.buffer->settle();
    check_cut(step.cut);
    step.cut.buffer->use();
  }
  masks_.clear();
  batch_.reset();
  if (std::any_of(steps.begin(), steps.end(), [](const Step& step) { return step.cut.read; })) {
    ggml_backend_synchronize(inner_);
    batch_.emplace(graph);
    of_batch_.clear();
  }
  if (seen.was_run && !seen.recording && worth_recording(steps) && can_record(steps)) {
    record(steps, graph, seen);
    if (seen.recording) {
      run_recorded(seen);
      return GGML_STATUS_SUCCESS;
    }
  }
  try {
    run(steps, graph);
    go_to_inner();
    end_graph(steps);
  } catch (...) {
    for (const Step& step : steps) {
      if (step.cut.layer) step.cut.buffer->cache().abandon();
    }
    throw;
  }
  seen.was_run = true;
  return GGML_STATUS_SUCCESS;
}

// The inner backend's next nodes and the host do not wait for this: it is for the next graph's tasks.
void StreamRunner::end_graph(const std::vector<Step>& steps) {
  std::set<KvBuffer*> ended;
  for (const Step& step : steps) {
    if (!step.cut.layer || !ended.insert(step.cut.buffer).second) continue;
    step.cut.buffer->cache().end_graph({nullptr, queue_.get()});
  }
}

void StreamRunner::run(const std::vector<Step>& steps, ggml_cgraph* graph) {
  for (const Step& step : steps) {
    if (!step.inner.empty()) run_inner(step.inner, graph);
    if (step.cut.layer) run_cut(steps, step.cut);
  }
}

// The inner backend captures CUDA graphs of its own when nodes come again, and tells graphs apart by their first node.
// It must not while this runner records, so the first node is then a marker that never comes again.
void StreamRunner::run_inner(std::vector<ggml_tensor*> nodes, const ggml_cgraph* graph) {
  go_to_inner();
  if (recording_) {
    marker_.op = GGML_OP_NONE;
    marker_.op_params[0]++;
    nodes.insert(nodes.begin(), &marker_);
  }
  ggml_cgraph part = part_of(*graph, nodes.data(), int(nodes.size()));
  if (ggml_backend_graph_compute_async(inner_, &part) != GGML_STATUS_SUCCESS) {
    throw std::runtime_error("the inner backend failed");
  }
}

void StreamRunner::run_cut(const std::vector<Step>& steps, const Cut& cut) {
  const Lane lane{nullptr, queue_.get()};
  KvCache& cache = cut.buffer->cache();
  if (cut.shift) {
    go_to_inner();
    ggml_backend_synchronize(inner_);
    return shift_keys(cut.shift, [&](ggml_tensor* node) {
      ggml_cgraph whole{};
      run_inner({node}, &whole);
      ggml_backend_synchronize(inner_);
    });
  }
  go_to_ours();
  mind_refused(cut);
  for (const ggml_tensor* node : cut.writes) {
    if (!node) continue;
    WriteTask task = write_task(node);
    task.sight = sight_of_writes(steps, cut, task.n_rows);
    for (const WriteTask& part : tasks_of_parts(*cut.layer, task)) cache.write(lane, part);
  }
  if (cut.read) return run_read(steps, cut);
  if (!cut.attend) return cache.flush(lane, cut.layer->index);
  AttendTask task = attend_task(cut.attend);
  task.ends_batch = is_last_use(steps, cut, cut.layer);
  DenseAttention dense;
  if (cache.attend(lane, task, &dense)) return;
  attend_dense(cut, task, dense);
  if (dense.is_whole) return;
  go_to_ours();
  cache.end_dense(lane, task);
}

// Runs the inner backend's flash attention over f16 rows that the engine has prepared.
void StreamRunner::attend_dense(const Cut& cut, const AttendTask& task, const DenseAttention& dense) {
  const AttentionProblem& p = task.problem;
  const int64_t dim = dense.dim;
  const auto stand_in = [&](int i, const void* data, ggml_type type, std::array<int64_t, 4> ne,
                            std::array<size_t, 3> nb) {
    ggml_tensor& tensor = stand_ins_[i];
    tensor = {};
    tensor.type = type;
    tensor.buffer = cut.buffer->inner();
    tensor.data = const_cast<void*>(data);
    std::copy(ne.begin(), ne.end(), tensor.ne);
    tensor.nb[0] = ggml_type_size(type);
    std::copy(nb.begin(), nb.end(), tensor.nb + 1);
    return &tensor;
  };
  const size_t row = dim * sizeof(float), cell = dim * sizeof(uint16_t), head = p.n_cells * cell;
  ggml_tensor& node = stand_ins_[0] = *cut.attend;
  if (dense.q) {
    node.src[0] = stand_in(1, dense.q, GGML_TYPE_F32, {dim, p.n_tokens, p.n_heads, p.n_streams},
                           {p.n_heads * row, row, p.n_tokens * p.n_heads * row});
  }
  for (int i = 0; i < 2; i++) {
    node.src[1 + i] = stand_in(2 + i, i == 0 ? dense.keys : dense.values, GGML_TYPE_F16,
                               {dim, p.n_cells, dense.n_kv_heads, p.n_streams}, {cell, head, dense.n_kv_heads * head});
  }
  ggml_cgraph whole{};
  run_inner({&node}, &whole);
}

// Which cells the tokens of the batch see. llama.cpp makes one mask for all layers of a cache, so any attention over a
// layer with as many cells tells. Rows that choose others may be written and not read; none of them is exact.
BatchSight StreamRunner::sight_of_writes(const std::vector<Step>& steps, const Cut& of, int64_t n_rows) {
  const auto fits = [&](const KvBuffer* buffer, const ManagedLayer& layer) {
    return buffer == of.buffer && layer.cells_per_stream() == of.layer->cells_per_stream();
  };
  for (const auto& [inner, cut] : steps) {
    if (cut.attend && fits(cut.buffer, *cut.layer)) return attend_task(cut.attend).sight();
  }
  for (const auto& [inner, cut] : steps) {
    if (!cut.read) continue;
    const ReadingNode node(cut.read);
    for (const ReadingNode::Source& source : node.sources()) {
      if (fits(source.buffer, *source.layer)) return sight_of_reading(source);
    }
  }
  if (of.layer->plan->as_f16) {
    BatchSight sight;
    sight.n_tokens = n_rows;
    sight.n_cells = of.layer->cells_per_stream();
    return sight;
  }
  throw std::runtime_error(
      "cells are written in a graph that does not attend to them: start with --flash-attn off if the device has no "
      "flash attention for this model, or run it without the THIMBLE device (--device none, or thimble --kv f16)");
}

// Its mask is copied to memory of the device's.
BatchSight StreamRunner::sight_of_reading(const ReadingNode::Source& source) {
  BatchSight sight = batch_->sight(*source.layer, source.rows.task);
  if (!sight.mask) return sight;
  InnerMemory& memory = of_batch_[sight.mask];
  if (!memory.buffer) {
    ggml_tensor mask{};
    mask.type = GGML_TYPE_F16;
    mask.ne[0] = int64_t(sight.mask_stream) * sight.n_streams;
    mask.ne[1] = mask.ne[2] = mask.ne[3] = 1;
    mask.nb[0] = sizeof(uint16_t);
    mask.nb[1] = mask.nb[2] = mask.nb[3] = mask.ne[0] * mask.nb[0];
    reserve(memory, mask.nb[1]);
    mask.buffer = memory.buffer.get();
    mask.data = memory.data();
    ggml_backend_tensor_set(&mask, sight.mask, 0, mask.nb[1]);
  }
  sight.mask = reinterpret_cast<const uint16_t*>(memory.data());
  return sight;
}

void StreamRunner::reserve(InnerMemory& memory, size_t bytes) {
  if (memory.buffer && ggml_backend_buffer_get_size(memory.buffer.get()) >= bytes) return;
  queue_->synchronize();
  ggml_backend_synchronize(inner_);
  memory.buffer.reset();
  memory.buffer.reset(ggml_backend_buft_alloc_buffer(ggml_backend_get_default_buffer_type(inner_), bytes));
  if (!memory.buffer) {
    throw std::runtime_error("no memory for " + std::to_string(bytes >> 20) +
                             " MiB of decoded rows: use a smaller context");
  }
}

// Runs a node of the inner backend's on rows that the cache decodes for it.
void StreamRunner::run_read(const std::vector<Step>& steps, const Cut& cut) {
  const ggml_tensor* node = cut.read;
  ReadingNode reading(node);
  reserve(rows_, reading.bytes());
  reading.place(rows_.data());
  for (ReadingNode::Source& source : reading.sources()) {
    if (!source.is_read) continue;
    ReadTask& task = source.rows.task;
    task.sight = batch_->sight(*source.layer, task);
    task.ends_batch = is_last_use(steps, cut, source.layer);
    if (const ggml_tensor* q = queries_of(node, task, task.sight)) {
      const size_t number = sizeof(float);
      task.queries = {static_cast<const float*>(q->data),
                      int(q->ne[2]),
                      int(q->ne[0]),
                      q->ne[1],
                      q->nb[1] / number,
                      q->nb[2] / number,
                      q->nb[3] / number};
    }
    for (const ReadTask& part : tasks_of_parts(*source.layer, task)) {
      source.buffer->cache().read({nullptr, queue_.get()}, part);
    }
  }
  ggml_cgraph whole{};
  run_inner({reading.tensor()}, &whole);
}

// Handles refused cells of the layer: drops those that are written now, and throws where the attention would see one of
// the others. Only where there are refused cells does the host wait for the cells and the mask.
void StreamRunner::mind_refused(const Cut& cut) {
  ManagedLayer& layer = *cut.layer;
  if (layer.refused.empty()) return;
  go_to_ours();
  queue_->synchronize();
  for (Kind kind : {Kind::key, Kind::value}) {
    const ggml_tensor* write = cut.writes[int(kind)];
    if (!write) continue;
    WriteTask task = write_task(write);
    std::vector<uint8_t> cells(ggml_nbytes(write->src[1]));
    ggml_backend_tensor_get(write->src[1], cells.data(), 0, cells.size());
    task.cells = cells.data();
    layer.refused.erase(task);
  }
  check_refused(cut);
}

void StreamRunner::check_refused(const Cut& cut) {
  const ManagedLayer& layer = *cut.layer;
  if (cut.read) {
    const ReadingNode node(cut.read);
    for (const ReadingNode::Source& source : node.sources()) {
      const ManagedLayer& read = *source.layer;
      read.refused.check(batch_->sight(read, source.rows.task), read.index, read.cells_per_stream());
    }
  }
  if (!cut.attend) return;
  BatchSight sight = attend_task(cut.attend).sight();
  if (const ggml_tensor* mask = cut.attend->src[3]) {
    const auto [it, is_new] = masks_.try_emplace(mask->data);
    if (is_new) {
      it->second.resize(ggml_nbytes(mask));
      ggml_backend_tensor_get(mask, it->second.data(), 0, it->second.size());
    }
    sight.mask = reinterpret_cast<const uint16_t*>(it->second.data());
  }
  layer.refused.check(sight, layer.index, layer.cells_per_stream());
}

}  // namespace thimble
