#include "plugin/runner.h"

#include "plugin/inline_runner.h"
#include "plugin/stream_runner.h"

namespace thimble {

std::unique_ptr<Runner> make_runner(Device& device, ggml_backend_t inner) {
  if (auto queue = device.engine().make_queue()) return std::make_unique<StreamRunner>(inner, std::move(queue));
  return std::make_unique<InlineRunner>(inner);
}

}  // namespace thimble
