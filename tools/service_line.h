// The part of `thimble doctor` that says how to give an existing service a coded cache.
#pragma once

#include <string>

namespace thimble {

/// Prints the environment variables that make a llama-server, however it is started, keep a coded cache, and checks
/// them by letting that program list its devices, which the line names. `profile`: a profile to name, or empty.
/// `llama`: the value of --llama, or empty. `own_devices`: the devices to name where no program lists any.
void print_service_line(const std::string& profile, const std::string& llama, const std::string& own_devices);

}  // namespace thimble
