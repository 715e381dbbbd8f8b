#include "plugin/inline_runner.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <utility>

#include "plugin/ggml_api.h"
#include "plugin/nodes.h"
#include "plugin/shift.h"

namespace thimble {

void InlineRunner::run_write(ggml_tensor*, int thread, int n_threads, void* data) {
  Op& op = *static_cast<Op*>(data);
  Team team(op.shared, thread, n_threads);
  if (thread == 0 && !op.layer->refused.empty()) op.layer->refused.erase(op.write);
  for (const WriteTask& task : tasks_of_parts(*op.layer, op.write)) {
    op.cache->write({&team, nullptr}, task);
    if (op.layer->plan->latent > 0) team.wait();
  }
}

void InlineRunner::run_attend(ggml_tensor*, int thread, int n_threads, void* data) {
  Op& op = *static_cast<Op*>(data);
  Team team(op.shared, thread, n_threads);
  const ManagedLayer& layer = *op.layer;
  if (!layer.refused.empty() &&
      !team.lead([&] { layer.refused.check(op.attend.sight(), layer.index, layer.cells_per_stream()); })) {
    return;
  }
  op.cache->attend({&team, nullptr}, op.attend, nullptr);
}

void InlineRunner::run_read(ggml_tensor*, int thread, int n_threads, void* data) {
  Op& op = *static_cast<Op*>(data);
  Team team(op.shared, thread, n_threads);
  const ManagedLayer& layer = *op.layer;
  const bool goes_on = team.lead([&] {
    if (!layer.refused.empty()) layer.refused.check(op.read->sight, layer.index, layer.cells_per_stream());
    if (op.queries) op.reading->queries = copy_queries(op.queries, op.reading->memory);
    op.read->queries = op.reading->queries;
  });
  if (!goes_on) return;
  for (const ReadTask& task : tasks_of_parts(layer, *op.read)) {
    op.cache->read({&team, nullptr}, task);
    if (layer.plan->latent > 0) team.wait();
  }
}

InlineRunner::Op& InlineRunner::add_op(KvBuffer& buffer, ManagedLayer& layer) {
  if (!layer.plan)
    throw std::runtime_error("layer " + std::to_string(layer.index) + " is used before its shape is known");
  buffer.settle();
  buffer.use();
  Op& op = ops_.emplace_back();
  op.cache = &buffer.cache();
  op.layer = &layer;
  op.shared.failure = &failure_;
  return op;
}

ggml_tensor* InlineRunner::stand_in(const ggml_tensor* node, ggml_custom_op_t run, Op& op) {
  ggml_tensor& custom = stand_ins_.emplace_back(*node);
  custom.op = custom_op();
  const ggml_custom_op_params params{run, GGML_N_TASKS_MAX, &op};
  std::memcpy(custom.op_params, &params, sizeof(params));
  return &custom;
}

// Runs the nodes that have been collected.
ggml_status InlineRunner::run_segment(ggml_cgraph* graph) {
  const std::vector<ggml_tensor*> nodes = std::exchange(nodes_, {});
  if (nodes.empty()) return GGML_STATUS_SUCCESS;
  if (ops_.empty() && int(nodes.size()) == graph->n_nodes) return ggml_backend_graph_compute(inner_, graph);
  size_t bytes = 0;
  for (const ReadingNode& node : reading_nodes_) bytes = std::max(bytes, node.bytes());
  if (rows_.size() < bytes) rows_ = std::vector<uint8_t>(bytes);
  for (ReadingNode& node : reading_nodes_) node.place(rows_.data());
  ggml_cgraph part = part_of(*graph, const_cast<ggml_tensor**>(nodes.data()), int(nodes.size()));
  return ggml_backend_graph_compute(inner_, &part);
}

void InlineRunner::add_read(ggml_tensor* node, const BatchOfGraph& batch) {
  ReadingNode& reading = reading_nodes_.emplace_back(node);
  for (ReadingNode::Source& source : reading.sources()) {
    if (!source.is_read) continue;
    Op& op = add_op(*source.buffer, *source.layer);
    op.read = &source.rows.task;
    op.read->sight = batch.sight(*source.layer, *op.read);
    op.read->ends_batch = false;
    op.queries = queries_of(node, *op.read, op.read->sight);
    op.reading = &readings_[op.layer];
    last_[op.layer] = &op;
    nodes_.push_back(stand_in(node, run_read, op));
  }
  nodes_.push_back(reading.tensor());
}

ggml_status InlineRunner::run_nodes(ggml_cgraph* graph) {
  // Layers are bound when llama.cpp asks whether we support their nodes; ggml's Meta device does not ask.
  std::vector<NodeKind> kinds;
  for (int i = 0; i < graph->n_nodes; i++) {
    std::string why;
    kinds.push_back(classify(graph->nodes[i], &why));
    if (kinds[i] == NodeKind::refused) throw std::runtime_error(why);
    kinds[i] = bind(graph->nodes[i], kinds[i]);
  }
  std::optional<BatchOfGraph> batch;
  if (std::find(kinds.begin(), kinds.end(), NodeKind::read) != kinds.end()) batch.emplace(graph);

  const auto run_inner = [&](ggml_tensor* node) {
    ggml_cgraph one{};
    one.nodes = &node;
    one.n_nodes = 1;
    if (ggml_backend_graph_compute(inner_, &one) != GGML_STATUS_SUCCESS) {
      throw std::runtime_error("the inner backend failed to rotate keys");
    }
  };
  for (int i = 0; i < graph->n_nodes; i++) {
    ggml_tensor* node = graph->nodes[i];
    if (kinds[i] == NodeKind::write) {
      Op& op = add_op(*KvBuffer::of(node), *KvBuffer::layer_of(node));
      op.write = write_task(node);
      nodes_.push_back(stand_in(node, run_write, op));
    } else if (kinds[i] == NodeKind::attend) {
      Op& op = add_op(*KvBuffer::of(node->src[1]), *KvBuffer::layer_of(node->src[1]));
      op.attend = attend_task(node);
      op.attend.ends_batch = false;
      last_[op.layer] = &op;
      nodes_.push_back(stand_in(node, run_attend, op));
    } else if (kinds[i] == NodeKind::read) {
      add_read(node, *batch);
    } else if (kinds[i] == NodeKind::shift) {
      KvBuffer::of(node)->settle();
      const ggml_status status = run_segment(graph);
      if (status != GGML_STATUS_SUCCESS || failure_) return status;
      shift_keys(node, run_inner);
    } else {
      nodes_.push_back(node);
    }
  }
  for (auto& [layer, op] : last_) (op->read ? op->read->ends_batch : op->attend.ends_batch) = true;
  return run_segment(graph);
}

ggml_status InlineRunner::compute(ggml_cgraph* graph) {
  ops_.clear();
  stand_ins_.clear();
  reading_nodes_.clear();
  readings_.clear();
  last_.clear();
  nodes_.clear();
  failure_.clear();
  ggml_status status = GGML_STATUS_FAILED;
  try {
    take_far_caches(graph);
    status = run_nodes(graph);
  } catch (const std::exception& error) {
    failure_.set(error.what());
  }
  const KvCache* asked = nullptr;
  for (const Op& op : ops_) {
    if (op.cache == asked) continue;
    asked = op.cache;
    const std::string warning = op.cache->take_warning();
    if (!warning.empty()) GGML_LOG_WARN("thimble: %s\n", warning.c_str());
  }
  if (failure_) throw std::runtime_error(failure_.why());
  return status;
}

}  // namespace thimble
