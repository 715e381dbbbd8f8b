// libggml-thimble.so, the library that a program loads. It looks at its host and opens the build of the plugin for the
// host's backend API version, which lies beside it, or refuses with one sentence. It includes no ggml header.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <string>

#include "loader/build.h"
#include "loader/host.h"

namespace {

using namespace thimble;

// Writes to stderr and not to ggml's log, which llama.cpp's programs write in another thread: without the device they
// end before it is written.
void say(const std::string& sentence) {
  std::fprintf(stderr, "thimble: %s\n", sentence.c_str());
}

std::filesystem::path own_folder() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&own_folder), &info) == 0 || !info.dli_fname) {
    throw std::runtime_error("the system does not say where the plugin lies");
  }
  return std::filesystem::absolute(info.dli_fname).parent_path();
}

const Build& open_build(const Host& host) {
  const std::string name = "libggml-thimble-api" + std::to_string(host.api_version()) + ".so";
  const std::filesystem::path path = own_folder() / name;
  const std::string wanted = "this program's ggml " + host.version() + " (backend API " +
                             std::to_string(host.api_version()) + ") takes " + name;
  if (!std::filesystem::exists(path)) {
    throw std::runtime_error(wanted + ", which is missing beside libggml-thimble.so (" + path.string() +
                             "): the folder was not copied whole; install Thimble again");
  }
  // The library is never closed: ggml keeps pointers into a backend for as long as the process lives.
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (!handle) {
    const char* why = dlerror();
    throw std::runtime_error(wanted + ", which does not load: " + (why ? why : "no reason given"));
  }
  const auto build = reinterpret_cast<BuildFunction>(dlsym(handle, kBuildSymbol));
  if (!build || std::strcmp(build()->release, THIMBLE_RELEASE) != 0) {
    throw std::runtime_error(wanted + ", but the one beside libggml-thimble.so (" + THIMBLE_RELEASE +
                             ") is of Thimble " + (build ? build()->release : "of another kind") +
                             ": install Thimble again");
  }
  if (build()->api_version != host.api_version()) {
    throw std::runtime_error(name + " is a build for backend API " + std::to_string(build()->api_version) +
                             ": install Thimble again");
  }
  if (build()->register_here != host.register_function()) {
    throw std::runtime_error(name + " found another copy of ggml than the one that loads it: load only one of them");
  }
  return *build();
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void* ggml_backend_init() {
  try {
    const Host host(__builtin_return_address(0));
    const Build& build = open_build(host);
    const char* why = nullptr;
    void* registry = build.open(&why);
    if (!registry) throw std::runtime_error(why);
    if (host.is_newer_than_tried()) {
      say("ggml " + host.version() +
          " is newer than any that this Thimble was tried in; its self-check passes, so it runs");
    }
    return registry;
  } catch (const std::exception& error) {
    say(error.what());
    return nullptr;
  }
}
