// What `thimble run` and `thimble serve` put into THIMBLE_KV: what the environment says, under what was typed.
#pragma once

#include <string>
#include <vector>

namespace thimble {

/// The flags, empty where one was not typed.
struct LaunchFlags {
  std::string kv, window, store, profile, policy;
  std::vector<std::string> set;  // key=value, for every other key of THIMBLE_KV
  std::string llama;             // whose programs to start (llama_program.h); nothing of THIMBLE_KV
};

struct LaunchSettings {
  std::string text;                // of THIMBLE_KV
  std::vector<std::string> notes;  // what took the place of something in the environment
  bool has(const std::string& key) const;
};

/// Throws std::invalid_argument with a sentence that names what was typed.
LaunchSettings merge_settings(const LaunchFlags& flags, const std::string& environment);

}  // namespace thimble
