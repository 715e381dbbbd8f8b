// Preloaded into llama.cpp's own test programs, which in a plain shared build never look at GGML_BACKEND_PATH.
#include "ggml-backend.h"

[[gnu::constructor]] static void load_backends() {
  ggml_backend_load_all();
}
