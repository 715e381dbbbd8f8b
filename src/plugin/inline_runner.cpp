#include "plugin/inline_runner.h"

#include <cstring>
#include <map>
#include <stdexcept>

#include "plugin/ggml_api.h"
#include "plugin/nodes.h"
#include "plugin/shift.h"

namespace thimble {

void InlineRunner::run_write(ggml_tensor*, int thread, int n_threads, void* data) {
  Op& op = *static_cast<Op*>(data);
  Team team(op.shared, thread, n_threads);
  if (thread == 0 && !op.layer->refused.empty()) op.layer->refused.erase(op.write);
  op.cache->write({&team, nullptr}, op.write);
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

void InlineRunner::replace(ggml_tensor** node, ggml_custom_op_t run, Op& op) {
  ggml_tensor& stand_in = stand_ins_.emplace_back(**node);
  stand_in.op = custom_op();
  const ggml_custom_op_params params{run, GGML_N_TASKS_MAX, &op};
  std::memcpy(stand_in.op_params, &params, sizeof(params));
  replaced_.emplace_back(node, *node);
  *node = &stand_in;
}

ggml_status InlineRunner::run_segment(ggml_cgraph* graph, int first, int last) {
  if (first == last) return GGML_STATUS_SUCCESS;
  // A whole graph is passed as it is: its number tells the inner backend that it comes again.
  if (first == 0 && last == ggml_graph_n_nodes(graph)) return ggml_backend_graph_compute(inner_, graph);
  ggml_cgraph part = part_of(*graph, ggml_graph_nodes(graph) + first, last - first);
  return ggml_backend_graph_compute(inner_, &part);
}

ggml_status InlineRunner::run_nodes(ggml_cgraph* graph) {
  const int n_nodes = ggml_graph_n_nodes(graph);
  ggml_tensor** nodes = ggml_graph_nodes(graph);
  std::map<const ManagedLayer*, Op*> last_attention;
  // Layers are bound when llama.cpp asks whether we support their attention; ggml's Meta device does not ask.
  for (int i = 0; i < n_nodes; i++) {
    if (nodes[i]->op == GGML_OP_FLASH_ATTN_EXT && classify(nodes[i]) == NodeKind::attend) bind(nodes[i]);
  }
  const auto run_inner = [&](ggml_tensor* node) {
    ggml_cgraph one{};
    one.nodes = &node;
    one.n_nodes = 1;
    if (ggml_backend_graph_compute(inner_, &one) != GGML_STATUS_SUCCESS) {
      throw std::runtime_error("the inner backend failed to rotate keys");
    }
  };
  int begin = 0;
  for (int i = 0; i < n_nodes; i++) {
    const ggml_tensor* node = nodes[i];
    std::string why;
    const NodeKind kind = classify(node, &why);
    if (kind == NodeKind::refused) throw std::runtime_error(why);
    if (kind == NodeKind::write) {
      Op& op = add_op(*KvBuffer::of(node), *KvBuffer::layer_of(node));
      op.write = write_task(node);
      replace(nodes + i, run_write, op);
    } else if (kind == NodeKind::attend) {
      Op& op = add_op(*KvBuffer::of(node->src[1]), *KvBuffer::layer_of(node->src[1]));
      op.attend = attend_task(node);
      op.attend.ends_batch = false;
      last_attention[op.layer] = &op;
      replace(nodes + i, run_attend, op);
    } else if (kind == NodeKind::shift) {
      KvBuffer::of(node)->settle();
      const ggml_status status = run_segment(graph, begin, i);
      if (status != GGML_STATUS_SUCCESS || failure_) return status;
      shift_keys(node, run_inner);
      begin = i + 1;
    }
  }
  for (auto& [layer, op] : last_attention) op->attend.ends_batch = true;
  return run_segment(graph, begin, n_nodes);
}

ggml_status InlineRunner::compute(ggml_cgraph* graph) {
  ops_.clear();
  stand_ins_.clear();
  replaced_.clear();
  failure_.clear();
  ggml_status status = GGML_STATUS_FAILED;
  try {
    take_far_caches(graph);
    status = run_nodes(graph);
  } catch (const std::exception& error) {
    failure_.set(error.what());
  }
  for (auto& [at, node] : replaced_) *at = node;
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
