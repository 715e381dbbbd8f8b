// Context shift: keys of cells whose position moves are read from the cache, rotated by the inner backend's own ROPE
// and written back, as many at a time as the cache allows.
#pragma once

#include <functional>

#include "ggml-backend-impl.h"

namespace thimble {

/// `node`: a ROPE in place on a key cache, whose inputs are computed. `run` computes a node of the inner backend and
/// waits for it. Throws std::runtime_error where the engine fails.
void shift_keys(const ggml_tensor* node, const std::function<void(ggml_tensor*)>& run);

}  // namespace thimble
