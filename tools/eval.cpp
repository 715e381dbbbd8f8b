// `thimble eval`: what a cache costs in quality, where it counts: the context is prefilled in batches, the next tokens
// are decoded one by one, teacher-forced, and every cache is compared with f16 on the same tokens.
#include <ggml-backend.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "commands.h"
#include "model.h"
#include "profile/profile.h"
#include "reference_cache.h"

namespace thimble {
namespace {

struct Options {
  std::string model, text, profile, json, plugin, device = "CPU";
  std::vector<std::string> caches = {"f16", "q8_0", "q4_0", "4", "2", "1"};
  int context = 8192, n_decode = 512, n_chunks = 1, n_batch = 512;
  int first = 8, last = 128;  // the exact window
  int n_threads = int(std::thread::hardware_concurrency());
  std::string policy = "all";
  bool reference = false;
};

/// One cache to measure: a type of llama.cpp's own, or rates of ours.
struct Cache {
  std::string name;
  ggml_type type = GGML_TYPE_F16;
  bool ours = false;
  double key_bits = 16, value_bits = 16;
  int top = 0;  // cells retrieved exactly
  bool drop_tail = false;
};

Cache parse_cache(const std::string& name) {
  Cache cache;
  cache.name = name;
  for (ggml_type type :
       {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0, GGML_TYPE_Q4_1, GGML_TYPE_Q4_0}) {
    if (name == ggml_type_name(type)) {
      cache.type = type;
      return cache;
    }
  }
  char* end = nullptr;
  cache.ours = true;
  cache.key_bits = cache.value_bits = std::strtod(name.c_str(), &end);
  if (*end == '/') cache.value_bits = std::strtod(end + 1, &end);
  if (*end == '+') cache.top = int(std::strtol(end + 1, &end, 10));
  if (cache.top > 0 && std::string(end) == "drop") {
    cache.drop_tail = true;
    end += 4;
  }
  if (end == name.c_str() || *end) {
    throw std::runtime_error("no cache called " + name +
                             ": f16, q8_0, q4_0, bits like 2, bits of keys/values like 3/1, or bits and retrieved "
                             "cells like 2+64 (2+64drop drops the other cells)");
  }
  return cache;
}

/// A context on a model with the cache wanted, however it comes about.
class Runner {
public:
  Runner(const Options& options, const Profile* profile, const Cache& cache, int n_cells) : options_(options) {
    const bool plugin = cache.ours && !options.reference;
    if (plugin) {
      // small=0: short contexts are coded too. The plugin reads its settings when a context's cache is allocated.
      char text[64];
      std::snprintf(text, sizeof text, "bits=%g/%g,window=%d+%d,small=0", cache.key_bits, cache.value_bits,
                    options.first, options.last);
      std::string retrieval;
      if (cache.top > 0) retrieval = ",top=" + std::to_string(cache.top) + ",policy=" + options.policy;
      if (cache.drop_tail) retrieval += ",tail=drop";
      setenv("THIMBLE_KV", (text + retrieval + (profile ? ",profile=" + options.profile : std::string())).c_str(), 1);
    }
    model_ = load_model(options.model, plugin ? "THIMBLE0" : options.device);
    llama_context_params params = llama_context_default_params();
    params.n_ctx = uint32_t(n_cells);
    params.n_batch = params.n_ubatch = uint32_t(options.n_batch);
    params.n_threads = params.n_threads_batch = options.n_threads;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.type_k = params.type_v = cache.type;
    if (cache.ours && options.reference) {
      reference_.emplace(profile, cache.key_bits, cache.value_bits, options.first, options.last);
      params.cb_eval = ReferenceCache::callback;
      params.cb_eval_user_data = &*reference_;
    }
    context_ = make_context(model_.get(), params);
  }

  void clear() {
    llama_memory_clear(llama_get_memory(context_.get()), true);
    if (reference_) reference_->clear();
  }
  /// Runs tokens; returns the log-probabilities of what follows the last of them.
  std::vector<float> decode(const llama_token* tokens, int n, int first) {
    decode_tokens(context_.get(), tokens, n, first, true);
    if (reference_) reference_->check();
    const float* logits = llama_get_logits_ith(context_.get(), -1);
    std::vector<float> out(logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(model_.get())));
    const float top = *std::max_element(out.begin(), out.end());
    double sum = 0;
    for (float v : out) sum += std::exp(double(v) - top);
    for (float& v : out) v -= top + float(std::log(sum));
    return out;
  }
  llama_model* model() const { return model_.get(); }

private:
  const Options& options_;
  ModelPtr model_;
  std::optional<ReferenceCache> reference_;
  ContextPtr context_;
};

/// Bytes of the keys and values of `n_cells` cells, the exact window included.
double cache_bytes(const Cache& cache, const Profile* profile, const ModelShape& shape, int n_cells, int n_window) {
  double bytes = 0;
  for (size_t i = 0; i < shape.layers.size(); i++) {
    const LayerShape& layer = shape.layers[i];
    for (Kind kind : {Kind::key, Kind::value}) {
      const int dim = layer.dim(kind);
      if (layer.n_kv_heads == 0) continue;
      if (!cache.ours) {
        bytes += double(ggml_row_size(cache.type, dim)) * layer.n_kv_heads * n_cells;
        continue;
      }
      const double bits = kind == Kind::key ? cache.key_bits : cache.value_bits;
      const Format format = profile && bits != 16 ? profile->format(int(i), kind, bits) : make_format(dim, bits);
      bytes += layer.n_kv_heads * (format.vector_bytes() * n_cells + (format.f16 ? 0.0 : 2.0 * dim * n_window));
    }
  }
  return bytes;
}

double n_values(const ModelShape& shape) {
  double n = 0;
  for (const LayerShape& layer : shape.layers) n += layer.n_kv_heads * (layer.key_dim + layer.value_dim);
  return n;
}

/// Heads and layers without running the model, for the size of its cache: from the profile where there is one.
ModelShape shape_of(const llama_model* model, const Profile* profile) {
  if (profile) return profile->shape;
  ModelShape shape;
  const int n_heads = llama_model_n_head(model), dim = llama_model_n_embd(model) / n_heads;
  shape.layers.assign(llama_model_n_layer(model), {llama_model_n_head_kv(model), n_heads, dim, dim});
  return shape;
}

using json = nlohmann::json;

double quantile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1, size_t(share * double(values.size())))];
}

json measure_text(const Options& options, const Profile* profile, const std::vector<Cache>& caches) {
  const int n_prefill = options.context - options.n_decode;
  if (n_prefill < 1) throw std::runtime_error("--decode must be smaller than the context");
  std::vector<llama_token> tokens;
  std::vector<std::vector<float>> exact;  // log-probabilities of f16, [chunk * n_decode]
  json rows = json::array();
  double exact_ppl = 0;
  for (const Cache& cache : caches) {
    Runner runner(options, profile, cache, (options.context + 255) / 256 * 256);
    if (tokens.empty()) {
      tokens = tokenize(runner.model(), read_text(options.text));
      if (tokens.size() < size_t(options.context) * options.n_chunks + 1) {
        throw std::runtime_error("the text has " + std::to_string(tokens.size()) +
                                 " tokens, too few for the context and chunks asked for");
      }
    }
    double nll = 0, seconds = 0;
    int agreements = 0;
    std::vector<double> divergences;
    ProgressBar bar(cache.name);
    for (int chunk = 0; chunk < options.n_chunks; chunk++) {
      const llama_token* text = &tokens[size_t(chunk) * options.context];
      runner.clear();
      runner.decode(text, n_prefill, 0);
      for (int i = 0; i < options.n_decode; i++) {
        const auto start = std::chrono::steady_clock::now();
        std::vector<float> p = runner.decode(text + n_prefill + i, 1, n_prefill + i);
        seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        nll -= p[text[n_prefill + i + 1]];
        const size_t at = size_t(chunk) * options.n_decode + i;
        if (&cache == &caches.front()) {
          exact.push_back(std::move(p));
          divergences.push_back(0);
          agreements++;
          continue;
        }
        double divergence = 0;
        for (size_t v = 0; v < p.size(); v++) {
          divergence += std::exp(double(exact[at][v])) * (double(exact[at][v]) - p[v]);
        }
        divergences.push_back(std::max(0.0, divergence));
        const auto top = [](const std::vector<float>& x) { return std::max_element(x.begin(), x.end()) - x.begin(); };
        agreements += top(p) == top(exact[at]);
        bar.update((chunk + double(i) / options.n_decode) / options.n_chunks);
      }
    }
    bar.finish();
    const double n = double(options.n_decode) * options.n_chunks, ppl = std::exp(nll / n);
    if (&cache == &caches.front()) exact_ppl = ppl;
    const ModelShape shape = shape_of(runner.model(), profile);
    const double bytes = cache_bytes(cache, profile, shape, options.context, options.first + options.last);
    double mean = 0;
    for (double d : divergences) mean += d / n;
    const json row = {{"kv", cache.name},
                      {"bits_per_value", cache_bytes(cache, profile, shape, 64, 0) / 64 * 8 / n_values(shape)},
                      {"kv_bytes", bytes},
                      {"ppl", ppl},
                      {"ppl_ratio", ppl / exact_ppl},
                      {"kld_mean", mean},
                      {"kld_p99", quantile(divergences, 0.99)},
                      {"top1_agreement", agreements / n},
                      {"decode_tok_s", n / seconds}};
    std::printf("%-6s %6.3f bits %8.2f MB  ppl %8.4f  ratio %.4f  kld %.5f  p99 %.4f  top-1 %.4f  %.1f tok/s\n",
                cache.name.c_str(), row["bits_per_value"].get<double>(), bytes / 1e6, ppl, ppl / exact_ppl, mean,
                row["kld_p99"].get<double>(), agreements / n, n / seconds);
    std::fflush(stdout);
    rows.push_back(row);
  }
  return rows;
}

void run(Options options) {
  start_llama();
  std::vector<Cache> caches;
  for (const std::string& name : options.caches) caches.push_back(parse_cache(name));
  // f16 first: everything is compared with it.
  std::erase_if(caches, [](const Cache& c) { return c.name == "f16"; });
  caches.insert(caches.begin(), parse_cache("f16"));
  const bool ours = std::any_of(caches.begin(), caches.end(), [](const Cache& c) { return c.ours; });
  const bool retrieval = std::any_of(caches.begin(), caches.end(), [](const Cache& c) { return c.top > 0; });
  if (retrieval && options.reference) throw std::runtime_error("--reference does not retrieve");
  if (ours && !options.reference && !ggml_backend_dev_by_name("THIMBLE0")) {
    if (!options.plugin.empty()) ggml_backend_load(options.plugin.c_str());
    if (!ggml_backend_dev_by_name("THIMBLE0")) {
      throw std::runtime_error("the plugin is not loaded: set GGML_BACKEND_PATH or give --plugin its path");
    }
  }
  std::optional<Profile> profile;
  if (!options.profile.empty()) profile = read_profile(options.profile);
  const json rows = measure_text(options, profile ? &*profile : nullptr, caches);
  if (options.json.empty()) return;
  const json out = {{"model", options.model.substr(options.model.find_last_of('/') + 1)},
                    {"text", options.text.substr(options.text.find_last_of('/') + 1)},
                    {"context", options.context},
                    {"decode", options.n_decode},
                    {"chunks", options.n_chunks},
                    {"window", {options.first, options.last}},
                    {"by", options.reference ? "reference" : "plugin"},
                    {"profile", profile ? profile->transform + ", " + profile->source : "none"},
                    {"rows", rows}};
  std::ofstream(options.json) << out.dump(1) << "\n";
}

}  // namespace

void add_eval_command(CLI::App& app) {
  auto* command = app.add_subcommand("eval", "Measure what a quantized cache costs in quality");
  auto options = std::make_shared<Options>();
  command->add_option("-m,--model", options->model, "Model, GGUF")->required();
  command->add_option("-f,--file", options->text, "Text to measure on")->required();
  command->add_option("-p,--profile", options->profile, "Calibrated profile; without it the uncalibrated codec");
  command->add_option("-c,--context", options->context)->capture_default_str();
  command->add_option("--decode", options->n_decode, "Tokens to decode one by one")->capture_default_str();
  command->add_option("--chunks", options->n_chunks, "Stretches of text to measure")->capture_default_str();
  command
      ->add_option("--policy", options->policy, "Layers that retrieve: all, or auto (those the profile calls sparse)")
      ->capture_default_str();
  command
      ->add_option(
          "--kv", options->caches,
          "Caches: f16, q8_0, q4_0, bits (2), bits of keys/values (3/1), bits and cells retrieved exactly (2+64, "
          "2+64drop)")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--first", options->first, "Exact cells at the start")->capture_default_str();
  command->add_option("--last", options->last, "Exact cells at the end")->capture_default_str();
  command->add_option("--batch", options->n_batch, "Tokens of a prefill batch")->capture_default_str();
  command->add_option("--device", options->device, "Device of the caches that are llama.cpp's own")
      ->capture_default_str();
  command->add_option("--plugin", options->plugin, "libggml-thimble.so, where GGML_BACKEND_PATH does not name it");
  command->add_flag("--reference", options->reference, "Code and decode inside an f16 cache, without the plugin");
  command->add_option("--json", options->json, "Write the rows here");
  command->add_option("-t,--threads", options->n_threads)->capture_default_str();
  command->callback([options] { run(*options); });
}

}  // namespace thimble
