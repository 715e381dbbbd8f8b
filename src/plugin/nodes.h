// How the nodes of a ggml graph that touch a coded cache are recognized and checked.
//
//   SET_ROWS into a cache            encode
//   FLASH_ATTN_EXT over caches       attention from codes
//   ROPE in place on a key cache     context shift: decode, rotate, encode
//   views, reshapes, permutations    nothing to do
// Any other node on a cache is refused.
#pragma once

#include <string>

#include "ggml.h"

namespace thimble {

enum class NodeKind { other, write, attend, shift, view, refused };

/// Whether an op only names memory.
bool is_view_op(ggml_op op);

/// What a node does to coded caches. For `refused`, `why` gets a sentence.
NodeKind classify(const ggml_tensor* node, std::string* why = nullptr);

/// Tells the layer that an attention node reads its head sizes, if it does not know them yet (KvBuffer::bind).
void bind(const ggml_tensor* node);

/// Of a FLASH_ATTN_EXT node, in ggml's order.
struct AttentionParameters {
  float scale, max_bias, softcap;
};
AttentionParameters attention_parameters(const ggml_tensor* node);

}  // namespace thimble
