#include "eval/session.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "eval/reference_cache.h"
#include "eval/tailorkv_cache.h"

namespace thimble {
namespace {

std::unique_ptr<EmulatedCache> emulate(const SessionOptions& options, const EvalCache& cache, int only_layer) {
  const Profile* profile = options.profile_of(cache).get();
  if (!profile) throw std::runtime_error("an emulated cache needs a profile: give one with --profile");
  if (cache.method == Method::tailorkv) {
    return std::make_unique<TailorKvCache>(*profile, options.first, options.last, cache.top);
  }
  if (cache.top > 0) throw std::runtime_error("--reference does not retrieve: leave it out to measure " + cache.name);
  return std::make_unique<ReferenceCache>(*profile, cache.key_bits, cache.value_bits, options.first, options.last,
                                          only_layer);
}

}  // namespace

std::string SessionOptions::settings(const EvalCache& cache) const {
  const std::string& path = profile_of(cache).path;
  return settings_of(cache, reference ? first + last : last, reference ? 0 : pool, policy) +
         (profile_of(cache).get() ? ",profile=" + path : "");
}

Session::Session(const SessionOptions& options, const EvalCache& cache, int n_cells, int only_layer) {
  const bool emulated = cache.coded && (options.reference || cache.method == Method::tailorkv);
  const bool plugin = cache.coded && !emulated;
  // The plugin reads its settings when a context's cache is allocated.
  if (plugin) setenv("THIMBLE_KV", options.settings(cache).c_str(), 1);
  model_ = load_model(options.model, plugin ? "THIMBLE0" : emulated ? "CPU" : options.device);
  llama_context_params params = llama_context_default_params();
  params.n_ctx = uint32_t((n_cells + 255) / 256 * 256);
  params.n_batch = params.n_ubatch = uint32_t(options.n_batch);
  params.n_threads = params.n_threads_batch = options.n_threads;
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
  params.type_k = params.type_v = cache.type;
  if (emulated) {
    emulated_ = emulate(options, cache, only_layer);
    params.cb_eval = EmulatedCache::callback;
    params.cb_eval_user_data = emulated_.get();
  }
  context_ = make_context(model_.get(), params);
}

void Session::clear() {
  llama_memory_clear(llama_get_memory(context_.get()), true);
  if (emulated_) emulated_->clear();
}

void Session::rewind(int n) {
  if (!llama_memory_seq_rm(llama_get_memory(context_.get()), 0, n, -1)) {
    throw std::runtime_error("this model's cache cannot forget its last tokens");
  }
}

std::vector<float> Session::decode(const llama_token* tokens, int n, int first) {
  decode_tokens(context_.get(), tokens, n, first, true);
  if (emulated_) emulated_->check();
  const float* logits = llama_get_logits_ith(context_.get(), -1);
  std::vector<float> out(logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(model_.get())));
  const float greatest = *std::max_element(out.begin(), out.end());
  double sum = 0;
  for (float v : out) sum += std::exp(double(v) - greatest);
  for (float& v : out) v -= greatest + float(std::log(sum));
  return out;
}

ModelShape shape_of(const llama_model* model, const Profile* profile) {
  if (profile) return profile->shape;
  ModelShape shape;
  const int n_heads = llama_model_n_head(model), dim = llama_model_n_embd(model) / n_heads;
  shape.layers.assign(llama_model_n_layer(model), {llama_model_n_head_kv(model), n_heads, dim, dim});
  return shape;
}

}  // namespace thimble
