// Running the graphs of an inner backend, with its cache nodes done by us (nodes.h says which these are).
#pragma once

#include <memory>

#include "ggml-backend-impl.h"

namespace thimble {

class Graph {
public:
  virtual ~Graph() = default;
  virtual ggml_status compute(ggml_cgraph* graph) = 0;
};

/// For a CPU backend or, in a build for CUDA, a CUDA one. Throws std::runtime_error where the device fails.
std::unique_ptr<Graph> make_graph(ggml_backend_t inner);

}  // namespace thimble
