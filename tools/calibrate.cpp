// `thimble calibrate`: runs the model over some text, learns how its keys and values are distributed, writes a profile.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <thread>

#include "calibrate/collector.h"
#include "calibrate/fit.h"
#include "calibrate/graph_reader.h"
#include "calibrate/output_metrics.h"
#include "commands.h"
#include "layout.h"
#include "model.h"

namespace thimble {
namespace {

struct Options {
  std::string model, text, output;
  int context = 0;
  int n_tokens = 24576;
  int window = 2048;
  double memory_gb = 2;
  int n_threads = int(std::thread::hardware_concurrency());
  FitOptions fit;
};

/// Text that the model generates from its first token alone: `n_tokens` in sequences of `length`, all sampled at once
/// at temperature 1.
std::vector<llama_token> sample_text(llama_model* model, int n_tokens, int length, const Options& options) {
  const llama_vocab* vocab = llama_model_get_vocab(model);
  const int n_sequences = std::max(1, std::min(32, n_tokens / length)), n_rounds = n_tokens / (n_sequences * length);
  llama_context_params params = llama_context_default_params();
  params.n_ctx = uint32_t(n_sequences * length);
  params.n_batch = params.n_ubatch = uint32_t(n_sequences);
  params.n_seq_max = uint32_t(n_sequences);
  params.n_threads = params.n_threads_batch = options.n_threads;
  const ContextPtr context = make_context(model, params);
  llama_batch batch = llama_batch_init(n_sequences, 0, 1);
  std::vector<llama_token> text;
  ProgressBar bar("sampling text from the model");
  std::mt19937_64 random(options.fit.seed);
  for (int round = 0; round < std::max(1, n_rounds); round++) {
    std::vector<std::vector<llama_token>> sequences(n_sequences);
    std::vector<llama_sampler*> samplers;
    for (int s = 0; s < n_sequences; s++) {
      // No beginning-of-sequence token: start anywhere in the vocabulary.
      const llama_token bos = llama_vocab_bos(vocab);
      sequences[s].push_back(bos >= 0 ? bos : llama_token(random() % uint64_t(llama_vocab_n_tokens(vocab))));
      samplers.push_back(llama_sampler_init_dist(uint32_t(random())));
    }
    for (int at = 0; at + 1 < length; at++) {
      batch.n_tokens = n_sequences;
      for (int s = 0; s < n_sequences; s++) {
        batch.token[s] = sequences[s].back();
        batch.pos[s] = at;
        batch.n_seq_id[s] = 1;
        batch.seq_id[s][0] = s;
        batch.logits[s] = true;
      }
      if (llama_decode(context.get(), batch) != 0) throw std::runtime_error("the model failed to sample a text");
      for (int s = 0; s < n_sequences; s++) {
        sequences[s].push_back(llama_sampler_sample(samplers[s], context.get(), s));
      }
      bar.update((round + double(at) / length) / std::max(1, n_rounds));
    }
    for (llama_sampler* sampler : samplers) llama_sampler_free(sampler);
    for (const auto& sequence : sequences) text.insert(text.end(), sequence.begin(), sequence.end());
    llama_memory_clear(llama_get_memory(context.get()), true);
  }
  llama_batch_free(batch);
  bar.finish();
  return text;
}

/// Takes `n_tokens` of the text, in stretches that are spread evenly over all of it.
std::vector<llama_token> spread(const std::vector<llama_token>& text, int n_tokens, int window) {
  const size_t n_windows = std::max<size_t>(1, size_t(n_tokens) / window);
  if (text.size() <= n_windows * window) return text;
  std::vector<llama_token> chosen;
  const size_t step = (text.size() - window) / n_windows;
  for (size_t w = 0; w < n_windows; w++) {
    chosen.insert(chosen.end(), text.begin() + w * step, text.begin() + w * step + window);
  }
  return chosen;
}

/// Lets a reader look on while a context runs, as its eval callback (`cb_eval`).
struct Watch {
  GraphReader& reader;
  std::string error;  // the first one: a callback must not throw through llama.cpp

  static bool callback(ggml_tensor* node, bool ask, void* user_data) {
    Watch& self = *static_cast<Watch*>(user_data);
    const bool wants = self.error.empty() && self.reader.wants(node);
    if (ask) return wants;
    if (!wants) return true;
    try {
      self.reader.read(node);
      return true;
    } catch (const std::exception& e) {
      self.error = e.what();
      return false;
    }
  }
  void check() const {
    if (!error.empty()) throw std::runtime_error(error);
  }
};

void run(Options options) {
  const auto start = std::chrono::steady_clock::now();
  start_llama();
  const ModelPtr model = load_model(options.model, "CPU", /*repack=*/false);
  if (options.context <= 0) options.context = llama_model_n_ctx_train(model.get());
  const CacheLayout layout = read_layout(options.model, {});  // which layers have a sliding window
  const bool sampled = options.text.empty();
  if (sampled) {
    std::fprintf(stderr, "No text given (-f): the model writes its own, %d tokens with seed %llu.\n",
                 options.n_tokens / 2, (unsigned long long)options.fit.seed);
  }
  // Sampling is several times slower than reading, so the model's own text is shorter.
  if (sampled) options.n_tokens /= 2;
  const std::vector<llama_token> tokens =
      sampled ? sample_text(model.get(), options.n_tokens, std::min(512, options.window), options)
              : spread(tokenize(model.get(), read_text(options.text)), options.n_tokens, options.window);
  const int n_tokens = int(tokens.size()), n_layers = llama_model_n_layer(model.get());

  StatisticsOptions statistics;
  statistics.context = options.context;
  statistics.n_tokens = tokens.size();
  statistics.seed = options.fit.seed;
  // At most all keys and values of the tokens, as f16. Of queries only the second moments are kept.
  const double token_bytes = 4.0 * n_layers * llama_model_n_embd(model.get()) * llama_model_n_head_kv(model.get()) /
                             llama_model_n_head(model.get());
  statistics.max_samples = size_t(std::max(1024.0, options.memory_gb * 1e9 / token_bytes));
  Collector collector(statistics);
  GraphReader reader(collector, n_layers);
  Watch watch{reader, {}};

  llama_context_params params = llama_context_default_params();
  params.n_ctx = uint32_t(options.window);
  params.swa_full = true;  // the collector takes a cell's number for its position
  params.n_batch = params.n_ubatch = uint32_t(std::min(512, options.window));
  params.n_threads = params.n_threads_batch = options.n_threads;
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
  params.cb_eval = Watch::callback;
  params.cb_eval_user_data = &watch;
  const ContextPtr context = make_context(model.get(), params);
  ProgressBar reading("reading");
  for (int begin = 0; begin < n_tokens; begin += options.window) {
    llama_memory_clear(llama_get_memory(context.get()), true);
    const int end = std::min(n_tokens, begin + options.window);
    for (int at = begin; at < end; at += int(params.n_ubatch)) {
      const int n = std::min(int(params.n_ubatch), end - at);
      reader.begin(at - begin, at + n == end, n);
      decode_tokens(context.get(), &tokens[at], n, at - begin, true);
      watch.check();
      reading.update(double(at) / n_tokens);
    }
  }
  collector.end();
  reading.finish();

  ModelShape shape = collector.shape(n_layers);
  char architecture[128] = "";
  llama_model_meta_val_str(model.get(), "general.architecture", architecture, sizeof architecture);
  shape.architecture = architecture;
  ProgressBar fitting("fitting");
  options.fit.n_threads = options.n_threads;
  for (const CacheLayout::Layer& layer : layout.layers) options.fit.budgets.push_back(layer.is_window);
  Profile profile = fit_profile(shape, collector.take_layers(n_layers), read_output_metrics(options.model, shape),
                                options.fit, [&](double share) { fitting.update(share); });
  fitting.finish();
  profile.source =
      (sampled ? std::string("text sampled from the model") : std::filesystem::path(options.text).filename().string()) +
      ", " + std::to_string(n_tokens) + " tokens, seed " + std::to_string(options.fit.seed) + ", positions to " +
      std::to_string(options.context);
  write_profile(profile, options.output);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("%s: %s, %.1f MB, calibrated in %.0f s\n", options.output.c_str(), profile.source.c_str(),
              double(std::filesystem::file_size(options.output)) / 1e6, seconds);
}

}  // namespace

void add_calibrate_command(CLI::App& app) {
  auto* command = app.add_subcommand("calibrate", "Learn a model's keys and values; write its profile");
  auto options = std::make_shared<Options>();
  command->add_option("-m,--model", options->model, "Model, GGUF")->required();
  command->add_option("-f,--file", options->text, "Text to calibrate on; without it the model writes its own");
  command->add_option("-o,--output", options->output, "Profile to write (default: beside the model)");
  command->add_option("-c,--context", options->context, "Longest context to serve (default: the model's)");
  command->add_option("-n,--tokens", options->n_tokens, "Tokens to read")->capture_default_str();
  command->add_option("--window", options->window, "Tokens of a sequence")->capture_default_str();
  command->add_option("--transform", options->fit.transform, "klt, or vecinfer as published")
      ->check(CLI::IsMember({"klt", "vecinfer"}))
      ->capture_default_str();
  command->add_option("--bits", options->fit.bits, "Rates to fit")->delimiter(',')->capture_default_str();
  command->add_flag("!--even", options->fit.uneven, "The same bits for every layer, keys and values");
  command->add_option("--iterations", options->fit.iterations, "Of k-means")->capture_default_str();
  command->add_option("--seed", options->fit.seed)->capture_default_str();
  command->add_option("--memory", options->memory_gb, "Gigabytes to keep samples in")->capture_default_str();
  command->add_option("-t,--threads", options->n_threads)->capture_default_str();
  command->callback([options] {
    if (options->output.empty()) {
      options->output = std::filesystem::path(options->model).replace_extension(".thimble.gguf").string();
    }
    run(*options);
  });
}

}  // namespace thimble
