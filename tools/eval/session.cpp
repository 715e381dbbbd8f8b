#include "eval/session.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "eval/kvarn_cache.h"
#include "eval/oscar_cache.h"
#include "eval/reference_cache.h"
#include "eval/tailorkv_cache.h"

namespace thimble {
namespace {

// The layers that an emulated cache codes: for TailorKV all, else those that the plugin would code. Throws where one of
// them has a sliding window, which uses cells again: emulated caches take a cell's number for its position.
std::vector<bool> emulated_layers(const SessionOptions& options, const EvalCache& cache, const CacheLayout& layout) {
  std::vector<bool> coded(layout.layers.size(), cache.method == Method::tailorkv);
  if (cache.method != Method::tailorkv) {
    for (const LayerPlan& plan : plan_layers(Settings::parse(options.settings(cache)), layout)) {
      coded[plan.layer] = plan.coded;
    }
  }
  for (size_t i = 0; i < coded.size(); i++) {
    if (coded[i] && layout.layers[i].is_window) {
      throw std::runtime_error("layer " + std::to_string(i) + " has a sliding window, which cannot be emulated" +
                               (cache.method == Method::tailorkv ? "" : ": leave --small at its default"));
    }
  }
  return coded;
}

std::unique_ptr<EmulatedCache> emulate(const SessionOptions& options, const EvalCache& cache, const CacheLayout& layout,
                                       int only_layer) {
  const Profile* profile = options.profile_of(cache).get();
  std::vector<bool> coded = emulated_layers(options, cache, layout);
  for (size_t i = 0; only_layer >= 0 && i < coded.size(); i++) coded[i] = coded[i] && int(i) == only_layer;
  if (cache.method == Method::kvarn) {
    std::vector<std::pair<int, int>> head_dims;
    for (const LayerShape& layer : layout.shape.layers) head_dims.emplace_back(layer.key_dim, layer.value_dim);
    return std::make_unique<KvarnCache>(int(cache.key_bits), int(cache.value_bits), std::move(coded),
                                        std::move(head_dims));
  }
  if (!profile) throw std::runtime_error("an emulated cache needs a profile: give one with --profile");
  if (cache.method == Method::oscar) return std::make_unique<OscarCache>(*profile, std::move(coded));
  if (cache.method == Method::tailorkv) {
    return std::make_unique<TailorKvCache>(*profile, options.first, options.last, cache.top);
  }
  if (cache.top > 0) throw std::runtime_error("--reference does not retrieve: leave it out to measure " + cache.name);
  return std::make_unique<ReferenceCache>(*profile, cache.key_bits, cache.value_bits, options.first, options.last,
                                          std::move(coded));
}

}  // namespace

std::string SessionOptions::settings(const EvalCache& cache) const {
  std::string more = "window=" + std::to_string(reference ? first + last : last) +
                     ",pool=" + std::to_string(reference ? 0 : pool) + ",small=" + std::to_string(small_cells);
  if (cache.top > 0) more += ",policy=" + policy;
  if (profile_of(cache).get()) more += ",profile=" + profile_of(cache).path;
  return settings_of(cache, more);
}

Session::Session(const SessionOptions& options, const EvalCache& cache, const CacheLayout& layout, int only_layer) {
  const bool emulated = cache.coded && (options.reference || !by_plugin(cache.method));
  const bool plugin = cache.coded && !emulated;
  // The plugin reads its settings when a context's cache is allocated.
  if (plugin) setenv("THIMBLE_KV", options.settings(cache).c_str(), 1);
  // TailorKV's attention is emulated as well, on the CPU.
  const bool on_cpu = emulated && cache.method == Method::tailorkv;
  model_ = load_model(options.model, plugin ? options.devices.coded : on_cpu ? "CPU" : options.devices.plain);
  llama_context_params params = context_params(options.context, options.n_threads);
  params.type_k = params.type_v = cache.type;
  if (emulated) {
    emulated_ = emulate(options, cache, layout, only_layer);
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

void Session::forget(int begin, int end) {
  if (!llama_memory_seq_rm(llama_get_memory(context_.get()), 0, begin, end)) {
    throw std::runtime_error("this model's cache cannot forget single tokens");
  }
}

int Session::read(const std::string& text, const std::function<void(double)>& progress) {
  const std::vector<llama_token> tokens = tokenize(model_.get(), text);
  read(tokens, progress);
  return int(tokens.size());
}

std::vector<float> Session::read(const std::vector<llama_token>& tokens, const std::function<void(double)>& progress) {
  clear();
  return decode(tokens.data(), int(tokens.size()), 0, [&](int n) {
    if (progress) progress(double(n) / double(tokens.size()));
  });
}

AnswerScore Session::answer(const Question& question, int first) {
  return score_answer(steps_of(question, tokenizer(/*special=*/true)),
                      [&](int32_t token) { return decode(&token, 1, first++); });
}

Tokenizer Session::tokenizer(bool special) const {
  return
      [this, special](const std::string& text) { return tokenize(model_.get(), text, /*add_special=*/false, special); };
}

TokenCount Session::token_count(bool special) const {
  return [tokens = tokenizer(special)](const std::string& text) { return int(tokens(text).size()); };
}

std::vector<float> Session::decode(const llama_token* tokens, int n, int first,
                                   const std::function<void(int)>& progress) {
  const int n_batch = int(llama_n_batch(context_.get()));
  for (int at = 0; at < n; at += n_batch) {
    const int n_here = std::min(n_batch, n - at);
    decode_tokens(context_.get(), tokens + at, n_here, first + at, at + n_here == n ? 1 : 0);
    if (progress) progress(at + n_here);
  }
  if (emulated_) emulated_->check();
  return log_probs(-1);
}

std::vector<std::vector<float>> Session::decode_each(const llama_token* tokens, int n, int first) {
  decode_tokens(context_.get(), tokens, n, first, n);
  if (emulated_) emulated_->check();
  std::vector<std::vector<float>> rows;
  for (int i = 0; i < n; i++) rows.push_back(log_probs(i));
  return rows;
}

// Of the token behind the i-th of the last batch, or behind the last where it is -1.
std::vector<float> Session::log_probs(int row) const {
  const float* logits = llama_get_logits_ith(context_.get(), row);
  std::vector<float> out(logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(model_.get())));
  const float greatest = *std::max_element(out.begin(), out.end());
  double sum = 0;
  for (float v : out) sum += std::exp(double(v) - greatest);
  for (float& v : out) v -= greatest + float(std::log(sum));
  return out;
}

}  // namespace thimble
