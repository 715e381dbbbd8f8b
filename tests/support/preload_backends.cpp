// Preloaded into llama.cpp's own test programs, which in a plain shared build never look at GGML_BACKEND_PATH, and
// which end while a thread still holds lines of their log.
//
// Where THIMBLE_TEST_ONLY_DEVICE names a device, the program itself sees no other one: test-llama-archs would spread
// the model of its Meta rows over a plugin's device and the one that this wraps.
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>

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

// The name of the one device that a caller at this address may see, or null where it may see all.
const char* only_device(const void* caller) {
  Dl_info info{};
  const bool is_library = dladdr(caller, &info) && info.dli_fname && std::strstr(info.dli_fname, ".so");
  return is_library ? nullptr : std::getenv("THIMBLE_TEST_ONLY_DEVICE");
}

}  // namespace

extern "C" size_t ggml_backend_dev_count() {
  if (const char* name = only_device(__builtin_return_address(0))) return ggml_backend_dev_by_name(name) ? 1 : 0;
  return next<decltype(&ggml_backend_dev_count)>("ggml_backend_dev_count")();
}

extern "C" ggml_backend_dev_t ggml_backend_dev_get(size_t index) {
  if (const char* name = only_device(__builtin_return_address(0))) return ggml_backend_dev_by_name(name);
  return next<decltype(&ggml_backend_dev_get)>("ggml_backend_dev_get")(index);
}

[[gnu::constructor]] static void load_backends() {
  std::atexit(flush_log);
  ggml_backend_load_all();
}
