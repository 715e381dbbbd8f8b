// The weights of the norms behind a model's queries and keys, from its graph. Compiled for each backend API version of
// ggml, as graph_reader.h is.
#pragma once

#include <vector>

struct ggml_tensor;

namespace thimble {

/// llama.cpp rotates what goes to a quantized cache by a Walsh-Hadamard matrix, which is an input of the graph. In
/// blocks of how many numbers it did so to these rows; 0: it did not.
int rotated_by(const ggml_tensor* rows);

/// The weights of the norm that queries or keys come from, which a graph may have rotated, scaled and reshaped since;
/// empty where there is none, and where a context is only tried out, whose weights have no memory. Sets *unread where
/// there are weights that cannot be read.
std::vector<float> norm_weights(const ggml_tensor* x, bool* unread);

}  // namespace thimble
