// How the nodes of a ggml graph that touch a coded cache are recognized and checked.
//
//   SET_ROWS into a cache            a WriteTask
//   FLASH_ATTN_EXT over caches       an AttendTask
//   ROPE in place on a key cache     context shift: keys are read, rotated and written (shift.h)
//   views, reshapes, permutations    nothing to do
// Any other node on a cache is refused.
#pragma once

#include <string>

#include "engine/kv_cache.h"
#include "ggml.h"

namespace thimble {

enum class NodeKind { other, write, attend, shift, view, refused };

/// Whether an op only names memory.
bool is_view_op(ggml_op op);

/// What a node does to coded caches. For `refused`, `why` gets a sentence.
NodeKind classify(const ggml_tensor* node, std::string* why = nullptr);

/// Tells the layer that an attention node reads its head sizes, if it does not know them yet (KvBuffer::bind).
void bind(const ggml_tensor* node);

/// What a node asks of the cache of its layer.
WriteTask write_task(const ggml_tensor* node);
AttendTask attend_task(const ggml_tensor* node);

/// Why the engine cannot run a node of this kind, or nothing.
std::string refusal(const ggml_tensor* node, NodeKind kind);

}  // namespace thimble
