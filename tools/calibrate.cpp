// `thimble calibrate`: runs the model over some text, learns how its keys and values are distributed, writes a profile.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <numeric>
#include <thread>

#include "calibrate/collector.h"
#include "calibrate/fit.h"
#include "calibrate/graph_reader.h"
#include "calibrate/output_metrics.h"
#include "calibration_text.h"
#include "commands.h"
#include "layout.h"
#include "model.h"
#include "paths.h"

namespace thimble {
namespace {

namespace fs = std::filesystem;

// Of the tokens to read, one in so many is text that the model writes.
constexpr int kOwnShare = 16;

constexpr int kTokensOfText = 24576, kTokensOfKinds = 30720;

struct Options {
  std::string model, text, texts = bin_directory() + "/texts", left_out, output;
  int context = 0;
  int n_tokens = 0;  // 0: kTokensOfText or kTokensOfKinds
  int window = 2048;
  double memory_gb = 2;
  int n_threads = int(std::thread::hardware_concurrency());
  FitOptions fit;
};

/// The texts to read, one for each kind.
std::vector<TextOfKind> texts_to_read(llama_model* model, const Options& options) {
  if (!options.text.empty()) {
    return {{fs::path(options.text).filename().string(),
             spread(tokenize(model, read_text(options.text)), options.n_tokens, options.window)}};
  }
  std::vector<TextOfKind> texts = texts_of_folder(model, options.texts);
  // Sampling is several times slower than reading, so the model's own text is shorter.
  const int n_own = options.n_tokens / kOwnShare, n_each = (options.n_tokens - n_own) / int(texts.size());
  for (TextOfKind& text : texts) text.tokens = spread(text.tokens, n_each, options.window);
  OwnText own;
  own.n_tokens = n_own;
  own.length = std::min(own.length, options.window);
  own.n_threads = options.n_threads;
  own.seed = options.fit.seed;
  // Half of it would answer the chats' questions.
  const bool without_chats = fs::exists(fs::path(options.texts) / (options.left_out + ".jsonl"));
  texts.push_back({"the model's own", own_text(model, without_chats ? "" : options.texts, own)});
  return texts;
}

/// "0.12 prose, 0.15 code"
std::string list_by_kind(const std::vector<double>& values, const std::vector<TextOfKind>& texts) {
  std::string list;
  for (size_t k = 0; k < values.size(); k++) {
    char value[32];
    std::snprintf(value, sizeof value, "%.3f ", values[k]);
    list += (k ? ", " : "") + (value + texts[k].kind);
  }
  return list;
}

/// The index of the kind that nothing is to be learned from; -1: there is none.
int left_out_kind(const Options& options, const std::vector<TextOfKind>& texts) {
  if (options.left_out.empty()) return -1;
  std::string names;
  for (size_t k = 0; k < texts.size(); k++) {
    if (texts.size() > 2 && texts[k].kind == options.left_out) return int(k);
    names += (k ? ", " : "") + texts[k].kind;
  }
  throw std::runtime_error("--leave-out takes one of several kinds of text: " + names);
}

void print_report(const FitReport& report, const std::vector<TextOfKind>& texts, int left_out) {
  if (report.rates.empty()) return;
  std::printf("Noise on text that was held out, over that of the codec without calibration:\n");
  for (const FitReport::Rate& rate : report.rates) {
    const double sum = std::accumulate(rate.noise.begin(), rate.noise.end(), 0.0);
    std::printf("  %g bits%s: mean %.3f, worst %.3f (%s)\n", rate.bits,
                rate.budget ? ", layers with a sliding window" : "", sum / double(rate.noise.size()),
                *std::max_element(rate.noise.begin(), rate.noise.end()), list_by_kind(rate.noise, texts).c_str());
    if (left_out >= 0) std::printf("    not seen: %s: %.3f\n", texts[left_out].kind.c_str(), rate.noise[left_out]);
  }
  std::printf(
      "%zu of %zu heads' keys or values keep the codec without calibration, as theirs serves some kind of text badly\n",
      report.n_built_in, report.n_heads);
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
  if (options.n_tokens <= 0) options.n_tokens = options.text.empty() ? kTokensOfKinds : kTokensOfText;
  const std::vector<TextOfKind> texts = texts_to_read(model.get(), options);
  size_t n_tokens = 0, n_read = 0;
  for (const TextOfKind& text : texts) n_tokens += text.tokens.size();
  const int n_layers = llama_model_n_layer(model.get());

  StatisticsOptions statistics;
  statistics.context = options.context;
  statistics.n_tokens = n_tokens;
  statistics.n_text_kinds = int(texts.size());
  statistics.left_out_kind = left_out_kind(options, texts);
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
  for (size_t kind = 0; kind < texts.size(); kind++) {
    const std::vector<llama_token>& tokens = texts[kind].tokens;
    for (int begin = 0; begin < int(tokens.size()); begin += options.window) {
      llama_memory_clear(llama_get_memory(context.get()), true);
      const int end = std::min(int(tokens.size()), begin + options.window);
      for (int at = begin; at < end; at += int(params.n_ubatch)) {
        const int n = std::min(int(params.n_ubatch), end - at);
        reader.begin(at - begin, at + n == end, n, int(kind));
        decode_tokens(context.get(), &tokens[at], n, at - begin, /*n_logits=*/1);
        watch.check();
        n_read += size_t(n);
        reading.update(double(n_read) / double(n_tokens));
      }
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
  FitReport report;
  Profile profile = fit_profile(
      shape, collector.take_layers(n_layers), read_output_metrics(options.model, shape), options.fit,
      [&](double share) { fitting.update(share); }, &report);
  fitting.finish();
  profile.source = (texts.size() > 1 ? std::to_string(texts.size()) + " kinds of text" : texts[0].kind) +
                   (options.left_out.empty() ? "" : " without " + options.left_out) + ", " + std::to_string(n_tokens) +
                   " tokens, seed " + std::to_string(options.fit.seed) + ", positions to " +
                   std::to_string(options.context);
  write_profile(profile, options.output);
  print_report(report, texts, statistics.left_out_kind);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("%s: %s, %.1f MB, calibrated in %.0f s\n", options.output.c_str(), profile.source.c_str(),
              double(std::filesystem::file_size(options.output)) / 1e6, seconds);
}

}  // namespace

void add_calibrate_command(CLI::App& app) {
  auto* command = app.add_subcommand("calibrate", "Learn a model's keys and values; write its profile");
  auto options = std::make_shared<Options>();
  command->add_option("-m,--model", options->model, "Model, GGUF")->required();
  command->add_option("-f,--file", options->text, "Text to calibrate on; without it, texts of several kinds");
  command->add_option("--texts", options->texts, "Folder of texts, a kind each, to read without -f")
      ->capture_default_str();
  command->add_option("--leave-out", options->left_out,
                      "A kind of text to learn nothing from, to see how a profile serves text that it has not seen");
  command->add_option("-o,--output", options->output, "Profile to write (default: beside the model)");
  command->add_option("-c,--context", options->context, "Longest context to serve (default: the model's)");
  command->add_option("-n,--tokens", options->n_tokens,
                      "Tokens to read (default: 24576 of a text, 30720 of several kinds)");
  command->add_option("--window", options->window, "Tokens of a sequence")->capture_default_str();
  command->add_option("--transform", options->fit.transform, "klt, or vecinfer or oscar as published")
      ->check(CLI::IsMember({"klt", "vecinfer", "oscar"}))
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
