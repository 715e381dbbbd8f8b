// Running the graphs of an inner backend, with its cache nodes done by an engine (nodes.h says which these are).
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

/// For a backend of the device that a Device wraps: beside its work where the engine has a queue, else within it.
/// Throws std::runtime_error where the device fails.
std::unique_ptr<Runner> make_runner(Device& device, ggml_backend_t inner);

}  // namespace thimble
