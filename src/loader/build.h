// The interface between libggml-thimble.so, the stub that a program loads, and a build of the plugin for one backend
// API version of ggml (libggml-thimble-api<N>.so). It includes no ggml header, since the stub must load into any
// version.
#pragma once

namespace thimble {

/// A build's description of itself.
struct Build {
  const char* release;        // of Thimble; stub and builds must be of one release
  int api_version;            // the GGML_BACKEND_API_VERSION that it was compiled for
  const char* ggml_version;   // the version of the headers that it was compiled with
  const void* register_here;  // what its ggml_backend_register was linked to; must be the host's function
  /// Checks the host and makes the devices. Returns the ggml_backend_reg_t, or null and a sentence in `why` (which
  /// lives until the next call).
  void* (*open)(const char** why);
};

/// The one symbol that a build exports: const Build* thimble_build(void).
using BuildFunction = const Build* (*)();
constexpr const char* kBuildSymbol = "thimble_build";

}  // namespace thimble
