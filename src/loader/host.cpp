#include "loader/host.h"

#include <dlfcn.h>

#include <cstddef>
#include <cstdlib>
#include <stdexcept>

#include "loader/versions.h"

namespace thimble {
namespace {

std::string to_string(const GgmlVersion& v) {
  return std::to_string(v.major) + "." + std::to_string(v.minor) + "." + std::to_string(v.patch);
}

// A handle of the library or program that holds an address. For a program, dlopen of its file would not do: only
// dlopen(nullptr) gives its symbols.
void* handle_of(const void* address) {
  Dl_info info{};
  if (dladdr(address, &info) != 0 && info.dli_fname) {
    if (void* handle = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL)) return handle;
  }
  return dlopen(nullptr, RTLD_NOW);
}

template <typename Function>
Function function(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

// GGML_BACKEND_PATH names a single backend, which is the plugin. Where a program had set it to a backend of its own (as
// Ollama does on a GPU), THIMBLE_BACKEND_PATH names that one. It is loaded here, before the plugin looks for devices.
void load_other_backend() {
  const char* path = std::getenv("THIMBLE_BACKEND_PATH");
  if (!path || !*path) return;
  const auto load = function<void* (*)(const char*)>("ggml_backend_load");
  if (!load || !load(path)) {
    throw std::runtime_error("THIMBLE_BACKEND_PATH=" + std::string(path) +
                             " does not load as a backend of this program");
  }
}

// ggml_backend_reg begins with the API version that the backend was compiled for, and a host registers only backends of
// its own version.
int api_of_registered_backend() {
  const auto count = function<size_t (*)()>("ggml_backend_reg_count");
  const auto get = function<const int* (*)(size_t)>("ggml_backend_reg_get");
  if (!count || !get || count() == 0) {
    throw std::runtime_error(
        "no backend of this program is loaded yet, the CPU's included: call ggml_backend_load_all() before the plugin "
        "is "
        "loaded");
  }
  return *get(0);
}

}  // namespace

Host::Host(const void* caller) {
  constexpr const char* kRegister = "ggml_backend_register";
  // Looked up in the caller's own library, not in the first that has the name: a process may hold two copies of ggml.
  register_function_ = dlsym(handle_of(caller), kRegister);
  if (!register_function_) {
    throw std::runtime_error(
        "the program that loads it shows no ggml functions to plugins (ggml is linked into it statically): use a "
        "llama.cpp "
        "with shared libraries, as its releases, Homebrew and the Docker images have");
  }
  if (register_function_ != dlsym(RTLD_DEFAULT, kRegister)) {
    throw std::runtime_error(
        "this process holds two copies of ggml, and the plugin would get the wrong one: load only one of the libraries "
        "that "
        "bring it");
  }
  const auto tell_version = function<const char* (*)()>("ggml_version");
  const char* text = tell_version ? tell_version() : nullptr;
  const auto version = parse_version(text);
  const std::string known = "Thimble is for ggml " + to_string(kOldestGgml) + " and later";
  if (!version) {
    throw std::runtime_error(
        known + ", but this program's ggml " +
        (text ? "says it is '" + std::string(text) + "'" : std::string("is too old to say its own")) +
        ": use a newer llama.cpp");
  }
  version_ = text;
  if (*version < kOldestGgml) {
    throw std::runtime_error(known + ", but this program has ggml " + version_ + ": use a newer llama.cpp");
  }
  is_newer_ = *version > kNewestTriedGgml;
  load_other_backend();
  api_version_ = api_of_registered_backend();
  for (int known_api : kApiVersions) {
    if (api_version_ == known_api) return;
  }
  throw std::runtime_error("this program has ggml " + version_ + ", whose backend API is version " +
                           std::to_string(api_version_) +
                           ", but this Thimble knows versions 2 (ggml 0.15 to 0.25.3) and 3 " + "(0.25.3 to " +
                           to_string(kNewestTriedGgml) + "): get a newer Thimble");
}

}  // namespace thimble
