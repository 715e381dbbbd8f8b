// Checks that the ggml that this build of the plugin was loaded into has the structs that it was compiled for.
#pragma once

#include <string>

namespace thimble {

/// Returns "", or the name of what differs in the host. Calls only public functions of ggml that touch no device.
std::string self_check();

}  // namespace thimble
