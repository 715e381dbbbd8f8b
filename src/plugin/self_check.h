// Whether the ggml that this build of the plugin was loaded into has the structs that it was compiled for.
#pragma once

#include <string>

namespace thimble {

/// Nothing, or what differs in the host. Asks only ggml's public functions, and only such as touch no device.
std::string self_check();

}  // namespace thimble
