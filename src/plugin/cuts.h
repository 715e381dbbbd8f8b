// Where a graph is cut for a backend that runs our nodes apart from its own: once a layer. The writes of new keys and
// values wait for the attention over them, so that all three nodes are one cut.
#pragma once

#include <vector>

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "plugin/kv_buffer.h"
#include "plugin/nodes.h"

namespace thimble {

/// What is done between two stretches of the inner backend's nodes, to one layer.
struct Cut {
  KvBuffer* buffer = nullptr;
  ManagedLayer* layer = nullptr;
  const ggml_tensor* writes[2] = {nullptr, nullptr};  // SET_ROWS, by Kind
  const ggml_tensor* attend = nullptr;                // FLASH_ATTN_EXT
  const ggml_tensor* shift = nullptr;                 // ROPE; then nothing else
};

/// The inner backend's nodes, then a cut (layer null: none, at the graph's end).
struct Step {
  std::vector<ggml_tensor*> inner;
  Cut cut;
};

/// Binds layers that attention nodes show the shape of. Throws std::runtime_error with a sentence where a node is
/// refused.
std::vector<Step> plan_cuts(ggml_cgraph* graph);

}  // namespace thimble
