// Where a graph is cut, so that the inner backend runs its nodes and a queue runs those of the cache: once a layer. The
// writes of new keys and values wait for the attention over them, so that all three nodes are one cut. A node that
// reads rows of a cache is a cut as well: the queue decodes the rows, and the inner backend runs the node on them.
#pragma once

#include <vector>

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "plugin/kv_buffer.h"
#include "plugin/nodes.h"

namespace thimble {

/// The nodes of one layer's cache that run between two stretches of the inner backend's nodes.
struct Cut {
  KvBuffer* buffer = nullptr;
  ManagedLayer* layer = nullptr;
  const ggml_tensor* writes[2] = {nullptr, nullptr};  // SET_ROWS, by Kind
  const ggml_tensor* attend = nullptr;                // FLASH_ATTN_EXT
  const ggml_tensor* read = nullptr;   // instead of `attend`: a node that reads rows, of this layer first
  const ggml_tensor* shift = nullptr;  // ROPE; the others are null then
};

/// A stretch of the inner backend's nodes, and the cut behind it. At the graph's end there may be none: cut.layer is
/// null then.
struct Step {
  std::vector<ggml_tensor*> inner;
  Cut cut;
};

/// Plans the cuts of a graph, and binds the layers of its attention nodes. Throws std::runtime_error with a sentence
/// where a node is refused.
std::vector<Step> plan_cuts(ggml_cgraph* graph);

}  // namespace thimble
