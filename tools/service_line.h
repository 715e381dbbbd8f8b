// The part of `thimble doctor` that says how to give an existing service a coded cache.
#pragma once

#include <string>

namespace thimble {

/// Prints the environment that makes a llama-server, however it is started, keep a coded cache, and checks it by having
/// that program list its devices. `profile`: a profile to name, or empty. `llama`: as --llama was typed, or empty.
void print_service_line(const std::string& profile, const std::string& llama);

}  // namespace thimble
