// dequantize_model <from.gguf> <to.gguf>: the same model with f32 weights. Products with quantized weights round the
// activations too, which makes two correct runs of plain llama.cpp (1 thread and 2, say) differ by an NMSE of 1e-3.
#include <cstdio>

#include "llama.h"

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s <from.gguf> <to.gguf>\n", argv[0]);
    return 2;
  }
  llama_log_set(
      [](ggml_log_level level, const char* line, void*) {
        if (level == GGML_LOG_LEVEL_ERROR) std::fputs(line, stderr);
      },
      nullptr);
  llama_model_quantize_params params = llama_model_quantize_default_params();
  params.ftype = LLAMA_FTYPE_ALL_F32;
  params.allow_requantize = true;
  return llama_model_quantize(argv[1], argv[2], &params) == 0 ? 0 : 1;
}
