// The part of `thimble doctor` that says how to give an existing service a coded cache.
#pragma once

#include <string>

namespace thimble {

/// Prints the environment variables that make a llama-server, however it is started, keep a coded cache, and checks
/// them by letting that program list its devices. `profile`: a profile to name, or empty. `llama`: the value of
/// --llama, or empty.
void print_service_line(const std::string& profile, const std::string& llama);

}  // namespace thimble
