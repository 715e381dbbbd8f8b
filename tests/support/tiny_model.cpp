#include "support/tiny_model.h"

#include <cmath>
#include <functional>
#include <random>
#include <stdexcept>

#include "ggml-backend.h"
#include "ggml.h"
#include "gguf.h"

namespace thimble::test {
namespace {

using Gguf = std::unique_ptr<gguf_context, void (*)(gguf_context*)>;

// Weights that make attention look at some cells more than at others; what only scales stays near 1.
void fill(ggml_tensor* tensor, void* tiny) {
  const std::string name = tensor->name;
  const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
  const bool scales = has("norm") && !has("bias");
  float mean = scales ? 1 : 0, deviation = 0.1f;
  if (has("q_norm") || has("k_norm")) mean = 0.35f;  // some models scale scores by nothing else
  if (has("ssm_a")) mean = -1;                       // states decay
  if (has("sinks")) deviation = 1;
  if (has("token_embd")) {
    deviation = 0.02f;  // what attention adds must count
  } else if (ggml_n_dims(tensor) > 1 && !has("ssm")) {
    deviation = (has("attn_output") ? 3.0f : 1.0f) / std::sqrt(float(tensor->ne[0]));
  }
  std::mt19937 random(unsigned(std::hash<std::string>{}(name)));
  std::normal_distribution<float> normal(mean, deviation);
  std::vector<float> numbers(ggml_nelements(tensor));
  for (float& x : numbers) x = normal(random);
  if (static_cast<const TinyModel*>(tiny)->great_keys && (has("q_norm") || has("k_norm"))) {
    for (size_t d : {numbers.size() / 2 - 1, numbers.size() - 1}) numbers[d] *= has("k_norm") ? 40 : 1 / 40.0f;
  }
  if (tensor->type == GGML_TYPE_F32) {
    ggml_backend_tensor_set(tensor, numbers.data(), 0, ggml_nbytes(tensor));
    return;
  }
  std::vector<ggml_fp16_t> halves(numbers.size());
  ggml_fp32_to_fp16_row(numbers.data(), halves.data(), int64_t(halves.size()));
  ggml_backend_tensor_set(tensor, halves.data(), 0, ggml_nbytes(tensor));
}

void set(gguf_context* gguf, const std::string& key, const Metadata::mapped_type& value) {
  if (const auto* number = std::get_if<uint32_t>(&value)) gguf_set_val_u32(gguf, key.c_str(), *number);
  if (const auto* number = std::get_if<float>(&value)) gguf_set_val_f32(gguf, key.c_str(), *number);
  if (const auto* array = std::get_if<std::vector<uint32_t>>(&value)) {
    gguf_set_arr_data(gguf, key.c_str(), GGUF_TYPE_UINT32, array->data(), array->size());
  }
}

}  // namespace

Metadata base_metadata() {
  return {{"vocab_size", uint32_t(kTinyVocabulary)},
          {"context_length", 8192u},
          {"embedding_length", 256u},
          {"block_count", 2u},
          {"feed_forward_length", 256u},
          {"attention.head_count", 4u},
          {"attention.head_count_kv", 4u},
          {"attention.layer_norm_epsilon", 1e-5f},
          {"attention.layer_norm_rms_epsilon", 1e-5f}};
}

TinyModel gemma4_like() {
  return {"gemma4",
          {{"attention.head_count", 8u},
           {"attention.head_count_kv", 2u},
           {"embedding_length_per_layer_input", 0u},
           {"attention.key_length", 512u},
           {"attention.value_length", 512u},
           {"attention.key_length_swa", 256u},
           {"attention.value_length_swa", 256u},
           {"rope.dimension_count", 512u},
           {"rope.dimension_count_swa", 256u},
           {"attention.sliding_window", 64u},
           {"attention.sliding_window_pattern", std::vector<uint32_t>{1, 0}}}};
}

TinyModel mla_like() {
  return {"deepseek2",
          {{"attention.head_count", 16u},
           {"attention.head_count_kv", 1u},
           {"attention.key_length", 576u},
           {"attention.value_length", 512u},
           {"attention.key_length_mla", 192u},
           {"attention.value_length_mla", 128u},
           {"attention.q_lora_rank", 256u},
           {"attention.kv_lora_rank", 512u},
           {"rope.dimension_count", 64u},
           {"leading_dense_block_count", 1u},
           {"expert_count", 2u},
           {"expert_used_count", 2u},
           {"expert_feed_forward_length", 64u},
           {"expert_shared_count", 1u}}};
}

std::shared_ptr<gguf_context> gguf_of(const TinyModel& tiny, const std::string& tokenizer) {
  std::shared_ptr<gguf_context> gguf(gguf_init_empty(), gguf_free);
  Metadata all = tiny.metadata;
  if (tokenizer.empty()) {
    gguf_set_val_str(gguf.get(), "tokenizer.ggml.model", "no_vocab");
  } else {
    const Gguf real(gguf_init_from_file(tokenizer.c_str(), {true, nullptr}), gguf_free);
    if (!real) throw std::runtime_error("cannot read " + tokenizer);
    gguf_set_kv(gguf.get(), real.get());
    all["vocab_size"] = uint32_t(gguf_get_arr_n(real.get(), gguf_find_key(real.get(), "tokenizer.ggml.tokens")));
  }
  gguf_set_val_str(gguf.get(), "general.architecture", tiny.architecture.c_str());
  all.merge(base_metadata());
  for (const auto& [key, value] : all) set(gguf.get(), tiny.architecture + "." + key, value);
  return gguf;
}

std::shared_ptr<llama_model> make_model(const TinyModel& tiny, const llama_model_params& params,
                                        const std::string& tokenizer) {
  const std::shared_ptr<gguf_context> gguf = gguf_of(tiny, tokenizer);
  TinyModel copy = tiny;
  llama_model* model = llama_model_init_from_user(gguf.get(), fill, &copy, params);
  if (!model) throw std::runtime_error("no model of architecture " + tiny.architecture);
  return {model, llama_model_free};
}

void write_adapter(const std::string& path, const llama_model* model, int rank) {
  const int n_embd = llama_model_n_embd(model), n_layer = llama_model_n_layer(model);
  const int n_kv = n_embd / llama_model_n_head(model) * llama_model_n_head_kv(model);
  const Gguf gguf(gguf_init_empty(), gguf_free);
  gguf_set_val_str(gguf.get(), "general.type", "adapter");
  gguf_set_val_str(gguf.get(), "general.architecture", "llama");
  gguf_set_val_str(gguf.get(), "adapter.type", "lora");
  gguf_set_val_f32(gguf.get(), "adapter.lora.alpha", float(rank));
  const size_t numbers = size_t(n_layer) * 2 * rank * (n_embd + n_kv);
  ggml_context* ctx =
      ggml_init({numbers * sizeof(float) + size_t(n_layer) * 8 * ggml_tensor_overhead(), nullptr, false});
  const std::unique_ptr<ggml_context, void (*)(ggml_context*)> owner(ctx, ggml_free);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (int layer = 0; layer < n_layer; layer++) {
    for (const char* weight : {"attn_k", "attn_v"}) {
      for (bool a : {true, false}) {
        ggml_tensor* t = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, a ? n_embd : rank, a ? rank : n_kv);
        ggml_format_name(t, "blk.%d.%s.weight.lora_%c", layer, weight, a ? 'a' : 'b');
        float* data = static_cast<float*>(t->data);
        for (int64_t i = 0; i < ggml_nelements(t); i++) data[i] = 0.6f * normal(random) / std::sqrt(float(t->ne[0]));
        gguf_add_tensor(gguf.get(), t);
      }
    }
  }
  if (!gguf_write_to_file(gguf.get(), path.c_str(), false)) throw std::runtime_error("cannot write " + path);
}

}  // namespace thimble::test
