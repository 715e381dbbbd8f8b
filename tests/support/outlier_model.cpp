// outlier_model <from.gguf> <to.gguf>: the same llama model with a bias on its keys that gives three channels of every
// KV head a constant offset of 20, 50 and 100 times the keys' standard deviation, as Qwen's keys have. The channels are
// among those that RoPE hardly rotates within some thousand tokens. So attention, and with it the model, hardly
// changes: an offset that all keys share drops out of the softmax.
#include <ggml.h>
#include <gguf.h>

#include <cstdio>
#include <memory>
#include <string>

namespace {

constexpr float kSpread = 2.0f;  // of SmolLM2's keys, a channel's standard deviation
constexpr struct {
  int from_end;  // RoPE turns a head's last channels slowest
  float times;
} kOffsets[] = {{1, 20.0f}, {3, 50.0f}, {6, -100.0f}};

int number(const gguf_context* file, const std::string& key) {
  const int64_t id = gguf_find_key(file, key.c_str());
  return id < 0 ? 0 : int(gguf_get_val_u32(file, id));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s <from.gguf> <to.gguf>\n", argv[0]);
    return 2;
  }
  ggml_context* weights = nullptr;
  const std::unique_ptr<gguf_context, void (*)(gguf_context*)> from(gguf_init_from_file(argv[1], {false, &weights}),
                                                                    gguf_free);
  if (!from || !weights) return 1;
  const std::unique_ptr<ggml_context, void (*)(ggml_context*)> owner(weights, ggml_free);
  const int n_layers = number(from.get(), "llama.block_count"),
            n_heads = number(from.get(), "llama.attention.head_count");
  const int n_kv_heads = number(from.get(), "llama.attention.head_count_kv");
  if (!n_layers || !n_heads || !n_kv_heads) return 1;
  const int dim = number(from.get(), "llama.embedding_length") / n_heads;

  const std::unique_ptr<gguf_context, void (*)(gguf_context*)> to(gguf_init_empty(), gguf_free);
  gguf_set_kv(to.get(), from.get());
  for (ggml_tensor* t = ggml_get_first_tensor(weights); t; t = ggml_get_next_tensor(weights, t)) {
    if (gguf_find_tensor(from.get(), t->name) >= 0) gguf_add_tensor(to.get(), t);
  }
  const std::unique_ptr<ggml_context, void (*)(ggml_context*)> biases(ggml_init({size_t{8} << 20, nullptr, false}),
                                                                      ggml_free);
  for (int layer = 0; layer < n_layers; layer++) {
    ggml_tensor* bias = ggml_new_tensor_1d(biases.get(), GGML_TYPE_F32, n_kv_heads * dim);
    ggml_format_name(bias, "blk.%d.attn_k.bias", layer);
    float* values = static_cast<float*>(bias->data);
    for (int i = 0; i < n_kv_heads * dim; i++) values[i] = 0;
    for (int h = 0; h < n_kv_heads; h++) {
      for (const auto& offset : kOffsets) values[(h + 1) * dim - offset.from_end] = kSpread * offset.times;
    }
    gguf_add_tensor(to.get(), bias);
  }
  return gguf_write_to_file(to.get(), argv[2], false) ? 0 : 1;
}
