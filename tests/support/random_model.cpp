// Writes a model with random weights of a shape that the small real models do not have, and the tokenizer of a real
// one.
//   random_model <gemma4 | mla> <model.gguf> <out.gguf>
#include <cstdio>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#include "ggml.h"
#include "gguf.h"
#include "llama.h"
#include "support/tiny_model.h"

namespace thimble::test {
namespace {

void write(const std::string& kind, const std::string& tokenizer, const std::string& out) {
  llama_backend_init();
  ggml_backend_dev_t none = nullptr;
  llama_model_params params = llama_model_default_params();
  params.devices = &none;
  params.n_gpu_layers = 0;
  const TinyModel tiny = kind == "gemma4" ? gemma4_like()
                         : kind == "mla"  ? mla_like()
                                          : throw std::runtime_error("there is no shape " + kind);
  llama_model_save_to_file(make_model(tiny, params, tokenizer).get(), out.c_str());
  // llama.cpp does not save all metadata of every architecture.
  ggml_context* tensors = nullptr;
  const std::shared_ptr<gguf_context> saved(gguf_init_from_file(out.c_str(), {false, &tensors}), gguf_free);
  if (!saved) throw std::runtime_error("cannot write " + out);
  const std::shared_ptr<ggml_context> owner(tensors, ggml_free);
  const std::shared_ptr<gguf_context> whole(gguf_init_empty(), gguf_free);
  gguf_set_kv(whole.get(), saved.get());
  gguf_set_kv(whole.get(), gguf_of(tiny, tokenizer).get());
  for (ggml_tensor* t = ggml_get_first_tensor(tensors); t; t = ggml_get_next_tensor(tensors, t)) {
    if (gguf_find_tensor(saved.get(), t->name) >= 0) gguf_add_tensor(whole.get(), t);
  }
  if (!gguf_write_to_file(whole.get(), out.c_str(), false)) throw std::runtime_error("cannot write " + out);
}

}  // namespace
}  // namespace thimble::test

int main(int argc, char** argv) {
  try {
    if (argc != 4) throw std::runtime_error("usage: random_model <gemma4 | mla> <model.gguf> <out.gguf>");
    thimble::test::write(argv[1], argv[2], argv[3]);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
