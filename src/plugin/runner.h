// Runs graphs: an engine runs the nodes that touch a coded cache (nodes.h), the inner backend runs all others.
#pragma once

#include <memory>

#include "ggml-backend-impl.h"
#include "plugin/device.h"

namespace thimble {

class Runner {
public:
  virtual ~Runner() = default;
  /// Throws std::runtime_error with a sentence where the engine fails.
  virtual ggml_status compute(ggml_cgraph* graph) = 0;
};

/// Makes the runner for an inner backend of `device`: a StreamRunner where the engine has a queue, else an
/// InlineRunner. Throws std::runtime_error where the device fails.
std::unique_ptr<Runner> make_runner(Device& device, ggml_backend_t inner);

}  // namespace thimble
