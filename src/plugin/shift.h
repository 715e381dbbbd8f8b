// Context shift: the keys of cells whose position changes are read from the cache, rotated by the inner backend's ROPE
// and written back, in pieces of at most KvCache::keys_at_once() cells.
#pragma once

#include <functional>

#include "ggml-backend-impl.h"

namespace thimble {

/// `node`: a ROPE in place on a key cache, whose inputs are computed. `run` computes a node of the inner backend and
/// waits for it. Throws std::runtime_error where the engine fails.
void shift_keys(const ggml_tensor* node, const std::function<void(ggml_tensor*)>& run);

}  // namespace thimble
