// Preloaded into llama.cpp's own test programs, which in a plain shared build never look at GGML_BACKEND_PATH, and
// which end while a thread still holds lines of their log.
#include <dlfcn.h>

#include <cstdlib>

#include "ggml-backend.h"

namespace {

// llama.cpp's common_log_flush(common_log_main()), where the program has them: common/log.h is no public header.
void flush_log() {
  const auto log_of_program = reinterpret_cast<void* (*)()>(dlsym(RTLD_DEFAULT, "_Z15common_log_mainv"));
  const auto flush = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_DEFAULT, "_Z16common_log_flushP10common_log"));
  if (log_of_program && flush) flush(log_of_program());
}

}  // namespace

[[gnu::constructor]] static void load_backends() {
  std::atexit(flush_log);
  ggml_backend_load_all();
}
