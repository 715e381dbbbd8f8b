// The devices that `eval` and `bench` measure on. Caches of llama.cpp's own are on a device itself; coded ones are on
// the plugin's device around it.
#pragma once

#include <string>

#include "engine/engine.h"

namespace thimble {

/// Names of ggml devices, separated by commas.
struct MeasuredDevices {
  std::string plain = "CPU";
  std::string coded = "THIMBLE0";
  HostDevice host = {"CPU", ""};  // the first of `plain`, as engines name it
};

/// Starts llama.cpp (start_llama) to measure on the devices of these names, of one kind or the other: "CPU",
/// "CUDA0,CUDA1", "THIMBLE0". The plugin, once it is loaded, wraps the devices that are named; where the names are its
/// own, it is loaded here and wraps what THIMBLE_KV's device= says. Throws std::runtime_error where there is no such
/// device.
MeasuredDevices start_llama_on(const std::string& names);

}  // namespace thimble
