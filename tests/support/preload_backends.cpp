// Preloaded into llama.cpp's own test programs, which in a plain shared build never look at GGML_BACKEND_PATH, and
// which end while a thread still holds lines of their log.
//
// Where THIMBLE_TEST_ONLY_DEVICES names devices, with commas between them, the program itself sees no others:
// test-llama-archs would spread the model of its Meta rows over a plugin's device and the one that this wraps.
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "ggml-backend.h"

namespace {

// llama.cpp's common_log_flush(common_log_main()), where the program has them: common/log.h is no public header.
void flush_log() {
  const auto log_of_program = reinterpret_cast<void* (*)()>(dlsym(RTLD_DEFAULT, "_Z15common_log_mainv"));
  const auto flush = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_DEFAULT, "_Z16common_log_flushP10common_log"));
  if (log_of_program && flush) flush(log_of_program());
}

template <typename Function>
Function next(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

// The names of the devices that a caller at this address may see, or null where it may see all.
const char* only_devices(const void* caller) {
  Dl_info info{};
  const bool is_library = dladdr(caller, &info) && info.dli_fname && std::strstr(info.dli_fname, ".so");
  return is_library ? nullptr : std::getenv("THIMBLE_TEST_ONLY_DEVICES");
}

// Those of these names that there are.
std::vector<ggml_backend_dev_t> devices_of(const char* names) {
  std::vector<ggml_backend_dev_t> devices;
  std::istringstream each(names);
  for (std::string name; std::getline(each, name, ',');) {
    if (ggml_backend_dev_t device = ggml_backend_dev_by_name(name.c_str())) devices.push_back(device);
  }
  return devices;
}

}  // namespace

extern "C" size_t ggml_backend_dev_count() {
  if (const char* names = only_devices(__builtin_return_address(0))) return devices_of(names).size();
  return next<decltype(&ggml_backend_dev_count)>("ggml_backend_dev_count")();
}

extern "C" ggml_backend_dev_t ggml_backend_dev_get(size_t index) {
  if (const char* names = only_devices(__builtin_return_address(0))) return devices_of(names).at(index);
  return next<decltype(&ggml_backend_dev_get)>("ggml_backend_dev_get")(index);
}

[[gnu::constructor]] static void load_backends() {
  std::atexit(flush_log);
  ggml_backend_load_all();
}
