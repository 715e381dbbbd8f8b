// What libggml-thimble.so, the stub that a program loads, and a build of the plugin for one backend API version of ggml
// (libggml-thimble-api<N>.so) agree on. No ggml in it: the stub must load into any version.
#pragma once

namespace thimble {

/// A build of the plugin, as it describes itself.
struct Build {
  const char* release;        // Thimble's; stub and builds are of one release
  int api_version;            // ggml's GGML_BACKEND_API_VERSION that it was compiled for
  const char* ggml_version;   // whose headers it was compiled with
  const void* register_here;  // where its reference to ggml_backend_register leads: into the host, or all is lost
  /// Checks the host and makes the devices. Returns the ggml_backend_reg_t, or null and a sentence in `why` (which
  /// lives until the next call).
  void* (*open)(const char** why);
};

/// The one symbol that a build exports: const Build* thimble_build(void).
using BuildFunction = const Build* (*)();
constexpr const char* kBuildSymbol = "thimble_build";

}  // namespace thimble
