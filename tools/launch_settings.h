// Makes the THIMBLE_KV of `thimble run` and `thimble serve`: that of the environment, with flags taking the place of
// its keys.
#pragma once

#include <string>
#include <vector>

namespace thimble {

/// The flags, empty where one was not typed.
struct LaunchFlags {
  std::string kv, window, store, profile, policy;
  std::vector<std::string> set;  // key=value, for every other key of THIMBLE_KV
  std::string llama;             // --llama: which llama.cpp to start (llama_program.h); not part of THIMBLE_KV
};

struct LaunchSettings {
  std::string text;                // of THIMBLE_KV
  std::vector<std::string> notes;  // a sentence for each flag that took the place of a key in the environment
  bool has(const std::string& key) const;
};

/// Throws std::invalid_argument with a sentence that names the flag.
LaunchSettings merge_settings(const LaunchFlags& flags, const std::string& environment);

}  // namespace thimble
