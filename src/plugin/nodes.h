// Recognizes and checks the nodes of a ggml graph that touch a coded cache:
//
//   SET_ROWS into a cache            a WriteTask
//   FLASH_ATTN_EXT over caches       an AttendTask, where the engine attends to the layer
//   ROPE in place on a key cache     context shift: keys are read, rotated and written (shift.h)
//   views, reshapes, permutations    nothing to do
//   any other node that reads one    ReadTasks: the inner device runs the node on decoded rows (row_reader.h)
// Any other node that writes to a cache is refused.
#pragma once

#include <string>
#include <vector>

#include "engine/kv_cache.h"
#include "ggml.h"

namespace thimble {

struct ManagedLayer;

enum class NodeKind { other, write, attend, shift, view, read, refused };

/// Whether an op computes nothing and only gives memory another shape or name.
bool is_view_op(ggml_op op);

/// What a node does to coded caches. Where it is `refused`, *why becomes a sentence.
NodeKind classify(const ggml_tensor* node, std::string* why = nullptr);

/// Takes what a node of this kind shows of its layer: whether values are transposed, and head sizes, to which a layer
/// is bound that is not bound yet. Nodes are to be shown in the order of their graph. Returns what the node does to the
/// layer as it is bound: attention may become a reading.
NodeKind bind(const ggml_tensor* node, NodeKind kind);

/// The task for the cache that a node stands for. Where its tensors have no memory yet, the task's pointers are null.
WriteTask write_task(const ggml_tensor* node);
/// The tasks that write or read the parts of a latent layer's rows (row_parts); others are one task. Only the last one
/// ends the batch.
std::vector<WriteTask> tasks_of_parts(const ManagedLayer& layer, const WriteTask& task);
std::vector<ReadTask> tasks_of_parts(const ManagedLayer& layer, const ReadTask& task);
AttendTask attend_task(const ggml_tensor* node);

/// A sentence that says why the engine cannot run a node of this kind, or "".
std::string refusal(const ggml_tensor* node, NodeKind kind);

}  // namespace thimble
