// `thimble bench`: speed of decoding and of reading a prompt at several depths, caches side by side, of one sequence or
// of several at a time. Every cache has a context of its own, and all use the same number of threads. Each round
// measures all caches in turn, so that other work on the machine slows all of them alike.
#include <ggml-backend.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "cell_copies.h"
#include "commands.h"
#include "context_options.h"
#include "devices.h"
#include "engine/settings.h"
#include "eval/cache.h"
#include "layout.h"
#include "model.h"
#include "paths.h"

namespace thimble {
namespace {

struct Options {
  std::string model, profile, json, device = "THIMBLE0";
  MeasuredDevices devices;
  llama_split_mode split = LLAMA_SPLIT_MODE_LAYER;  // of a model over several devices
  int window = Settings().window.last, pool = Settings().window.pool, small_cells = Settings().small_cells;
  ContextShape context;
  std::vector<int> depths = {0, 4096, 8000};
  std::vector<std::string> caches = {"f16", "q8_0", "q4_0", "4", "2", "1"};
  int n_sequences = 1, n_read = 0, n_decode = 32, n_prompt = 512, rounds = 5;
  int n_threads = int(std::thread::hardware_concurrency());

  /// THIMBLE_KV for a coded cache.
  std::string settings(const EvalCache& cache) const {
    const std::string more =
        "window=" + std::to_string(window) + ",pool=" + std::to_string(pool) + ",small=" + std::to_string(small_cells);
    return settings_of(cache, more + (profile.empty() ? "" : ",profile=" + profile));
  }
};

using Clock = std::chrono::steady_clock;
using json = nlohmann::json;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  return x.size() % 2 ? x[x.size() / 2] : (x[x.size() / 2 - 1] + x[x.size() / 2]) / 2;
}

// Bytes a second that all threads together read from memory, the bound for attention over a large cache.
double memory_bandwidth(int n_threads) {
  const size_t n = size_t{64} << 20;  // numbers of 8 bytes: 512 MiB, past any cache that a core has to itself
  std::vector<uint64_t> data(n, 1);
  std::vector<double> rates;
  for (int round = 0; round < 5; round++) {
    std::vector<std::thread> team;
    std::vector<uint64_t> sums(n_threads);
    const auto start = Clock::now();
    for (int t = 0; t < n_threads; t++) {
      team.emplace_back([&, t] {
        uint64_t sum = 0;
        for (size_t i = n * t / n_threads; i < n * (t + 1) / n_threads; i++) sum += data[i];
        sums[t] = sum;
      });
    }
    for (std::thread& t : team) t.join();
    rates.push_back(double(n) * 8 / seconds_since(start));
    if (sums[0] == 0) throw std::logic_error("memory was not read");
  }
  return *std::max_element(rates.begin(), rates.end());
}

struct Cache {
  std::string name;
  ModelPtr model;
  ContextPtr context;
  double bytes = 0;                                // of the whole cache, as ggml reports it
  std::vector<std::pair<int64_t, double>> layers;  // cells, and bytes of them all
  int n_sequences = 1;
  int depth = 0;  // cells that each sequence fills

  /// Bytes that attention reads at this depth.
  double read_bytes() const {
    double sum = 0;
    for (const auto& [n_cells, of_layer] : layers) {
      if (n_cells == 0) continue;
      sum += of_layer * double(std::min<int64_t>(int64_t(depth) * n_sequences, n_cells)) / double(n_cells);
    }
    return sum;
  }

  /// Every sequence reads tokens[first], ..., tokens[last - 1], one sequence after the other.
  void read(const std::vector<llama_token>& tokens, int first, int last, int n_logits) {
    for (int s = 0; s < n_sequences; s++) {
      decode_tokens(context.get(), &tokens[first], last - first, first, n_logits, s);
    }
    llama_synchronize(context.get());
  }
  /// Every sequence decodes a token at `position`, all of them in one batch.
  void decode(const std::vector<llama_token>& tokens, int position) {
    // Each sequence has a token of its own, as a mixture of experts takes longer for tokens that differ.
    std::vector<llama_token> step(n_sequences);
    for (int s = 0; s < n_sequences; s++) step[s] = tokens[(size_t(position) + s) % tokens.size()];
    decode_together(context.get(), step.data(), n_sequences, position);
    llama_synchronize(context.get());
  }
  /// Leaves each sequence its first `depth` cells.
  void rewind() {
    for (int s = 0; s < n_sequences; s++) llama_memory_seq_rm(llama_get_memory(context.get()), s, depth, -1);
  }
};

/// Tokens a second of all sequences together, a number for each round.
struct Speed {
  std::vector<double> decode, prompt;
  std::vector<double> step_ms;  // of every decoded batch
};

// Sums up the "KV buffer size" lines of the log while a context is made.
double logged_bytes = 0;
void read_log(ggml_log_level level, const char* text, void*) {
  if (const char* at = std::strstr(text, "KV buffer size =")) logged_bytes += std::atof(at + 16) * (1 << 20);
  if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

// The number of cells and the bytes of each layer's cache.
std::vector<std::pair<int64_t, double>> layer_bytes(const Options& options, const EvalCache& cache,
                                                    const CacheLayout& layout) {
  std::vector<std::pair<int64_t, double>> bytes;
  if (cache.coded) {
    for (const LayerPlan& plan : plan_layers(Settings::parse(options.settings(cache)), layout)) {
      bytes.emplace_back(plan.shape.n_cells(), plan.coded ? plan.bytes[0] + plan.bytes[1] : plan.f16_bytes);
    }
    return bytes;
  }
  for (size_t i = 0; i < layout.layers.size(); i++) {
    const LayerShape& layer = layout.shape.layers[i];
    const int64_t n = layout.cells(int(i));
    const size_t cell = ggml_row_size(cache.type, layer.key_dim) + ggml_row_size(cache.type, layer.value_dim);
    bytes.emplace_back(n, double(n) * double(cell) * layer.n_kv_heads);
  }
  return bytes;
}

Cache make_cache(const Options& options, const EvalCache& kind, const CacheLayout& layout) {
  Cache cache;
  cache.name = kind.name;
  cache.n_sequences = options.n_sequences;
  llama_context_params params = context_params(options.context, options.n_threads);
  params.type_k = params.type_v = kind.type;
  if (kind.coded) setenv("THIMBLE_KV", options.settings(kind).c_str(), 1);
  cache.model = load_model(options.model, kind.coded ? options.devices.coded : options.devices.plain, /*repack=*/true,
                           options.split);
  logged_bytes = 0;
  cache.context = make_context(cache.model.get(), params);
  cache.bytes = logged_bytes;
  cache.layers = layer_bytes(options, kind, layout);
  return cache;
}

// Of no more than `n_read` tokens that are read, if it is not 0, and copies of their cells.
void fill(Cache& cache, const std::vector<llama_token>& tokens, int depth, int n_read) {
  if (depth == cache.depth) return;
  const auto start = Clock::now();
  int at = cache.depth;
  if (n_read > 0 && depth > n_read) {
    llama_memory_clear(llama_get_memory(cache.context.get()), false);
    cache.read(tokens, 0, n_read, /*n_logits=*/0);
    fill_with_copies(cache.context.get(), n_read, depth);
    at = depth / n_read * n_read;
  }
  if (at < depth) cache.read(tokens, at, depth, /*n_logits=*/0);
  if (n_read > 0 && depth > n_read) {
    std::printf("%6d %-6s filled with copies of %d cells in %.1f s\n", depth, cache.name.c_str(), n_read,
                seconds_since(start));
  } else {
    std::printf("%6d %-6s filled from %d at %.1f tokens/s\n", depth, cache.name.c_str(), cache.depth,
                (depth - cache.depth) * cache.n_sequences / seconds_since(start));
  }
  std::fflush(stdout);
  cache.depth = depth;
}

void measure_round(const Options& options, Cache& cache, const std::vector<llama_token>& tokens, Speed& speed) {
  auto start = Clock::now();
  for (int i = 0; i < options.n_decode; i++) {
    const auto step = Clock::now();
    cache.decode(tokens, cache.depth + i);
    speed.step_ms.push_back(1e3 * seconds_since(step));
  }
  speed.decode.push_back(options.n_decode * options.n_sequences / seconds_since(start));
  cache.rewind();
  start = Clock::now();
  cache.read(tokens, cache.depth, cache.depth + options.n_prompt, /*n_logits=*/1);
  speed.prompt.push_back(options.n_prompt * options.n_sequences / seconds_since(start));
  cache.rewind();
}

/// Prints a cache's row and returns it. `f16`: the speed of the f16 cache, null where there is none; `step_at_0`:
/// seconds of a decode step of this cache at depth 0, 0 where that was not measured.
json print_row(const Cache& cache, const Speed& speed, const Speed* f16, double step_at_0) {
  const auto &d = speed.decode, &p = speed.prompt;
  const auto [d_low, d_high] = std::minmax_element(d.begin(), d.end());
  const auto [p_low, p_high] = std::minmax_element(p.begin(), p.end());
  json row = {{"depth", cache.depth},     {"sequences", cache.n_sequences}, {"kv", cache.name},
              {"kv_bytes", cache.bytes},  {"decode_tok_s", median(d)},      {"decode_tok_s_range", {*d_low, *d_high}},
              {"step_ms", speed.step_ms}, {"prompt_tok_s", median(p)},      {"prompt_tok_s_range", {*p_low, *p_high}}};
  char ratio[32] = "", prompt_ratio[32] = "", share[32] = "", rate[32] = "";
  if (f16) {
    // Ratios of the same round, since whatever slows the machine for a while slows both.
    std::vector<double> decode_ratios, prompt_ratios;
    for (size_t i = 0; i < d.size(); i++) decode_ratios.push_back(d[i] / f16->decode[i]);
    for (size_t i = 0; i < p.size(); i++) prompt_ratios.push_back(p[i] / f16->prompt[i]);
    row["decode_over_f16"] = median(decode_ratios);
    row["prompt_over_f16"] = median(prompt_ratios);
    std::snprintf(ratio, sizeof(ratio), "%.2f", median(decode_ratios));
    std::snprintf(prompt_ratio, sizeof(prompt_ratio), "%.2f", median(prompt_ratios));
  }
  if (cache.depth > 0 && step_at_0 > 0) {
    const double step = cache.n_sequences / median(d), attention = std::max(0.0, step - step_at_0);
    const double bytes_per_s = attention > 0 ? cache.read_bytes() / attention : 0;
    row["attention_share"] = attention / step;
    row["attention_bytes_per_s"] = bytes_per_s;
    std::snprintf(share, sizeof(share), "%.0f %%", 100 * attention / step);
    std::snprintf(rate, sizeof(rate), "%.1f", bytes_per_s / 1e9);
  }
  std::printf("%6d %-6s %10.2f %9.1f [%6.1f, %7.1f] %6s %9.1f [%6.1f, %7.1f] %6s %9s %7s\n", cache.depth,
              cache.name.c_str(), cache.bytes / (1 << 20), median(d), *d_low, *d_high, ratio, median(p), *p_low,
              *p_high, prompt_ratio, share, rate);
  return row;
}

void run(Options options) {
  options.devices = start_llama_on(options.device);
  load_plugin();
  options.context.device = options.devices.host;
  llama_log_set(read_log, nullptr);
  std::vector<int> depths = options.depths;
  std::sort(depths.begin(), depths.end());
  const int n_tokens = depths.back() + std::max(options.n_decode, options.n_prompt);  // of a sequence
  if (options.n_read > 0 && (options.n_sequences > 1 || !options.context.unified)) {
    throw std::runtime_error("--read copies cells of one sequence: leave --sequences and --streams out");
  }
  options.context.n_sequences =
      std::max({options.context.n_sequences, options.n_sequences, options.n_read > 0 ? 2 : 1});
  options.context.n_cells = n_tokens * (options.context.unified ? options.n_sequences : 1);
  const CacheLayout layout = read_layout(options.model, options.context);
  std::vector<Cache> caches;
  for (const std::string& name : options.caches) caches.push_back(make_cache(options, parse_cache(name), layout));
  std::mt19937 random(1);
  const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(caches.front().model.get()));
  std::vector<llama_token> tokens(n_tokens);
  for (llama_token& t : tokens) t = llama_token(random() % uint32_t(n_vocab));

  const double bandwidth = memory_bandwidth(options.n_threads);
  std::printf(
      "memory reads at %.1f GB/s with %d threads; medians of %d rounds, lowest and highest in brackets%s\n",
      bandwidth / 1e9, options.n_threads, options.rounds,
      options.n_sequences > 1 ? ("; " + std::to_string(options.n_sequences) + " sequences together").c_str() : "");
  std::printf("%6s %-6s %10s %28s %6s %28s %6s %9s %7s\n", "depth", "kv", "KV MiB", "decode tokens/s", "x f16",
              "prompt tokens/s", "x f16", "attention", "GB/s");
  std::map<std::string, double> step_at_0;
  json rows = json::array();
  for (int depth : depths) {
    std::map<std::string, Speed> speeds;
    for (Cache& cache : caches) fill(cache, tokens, depth, options.n_read);
    for (int round = 0; round < options.rounds + 1; round++) {
      for (Cache& cache : caches) {
        Speed warming_up;
        measure_round(options, cache, tokens, round == 0 ? warming_up : speeds[cache.name]);
      }
    }
    for (const Cache& cache : caches) {
      const Speed& speed = speeds[cache.name];
      if (depth == 0) step_at_0[cache.name] = cache.n_sequences / median(speed.decode);
      rows.push_back(print_row(cache, speed, speeds.count("f16") ? &speeds["f16"] : nullptr, step_at_0[cache.name]));
    }
    std::fflush(stdout);
  }
  if (options.json.empty()) return;
  const json out = {{"model", options.model.substr(options.model.find_last_of('/') + 1)},
                    {"threads", options.n_threads},
                    {"rounds", options.rounds},
                    {"memory_bytes_per_s", bandwidth},
                    {"device", ggml_backend_dev_description(ggml_backend_dev_by_name("THIMBLE0"))},
                    {"devices", options.devices.plain},
                    {"rows", rows}};
  std::ofstream(options.json) << out.dump(1) << "\n";
}

}  // namespace

void add_bench_command(CLI::App& app) {
  static Options options;
  CLI::App* command =
      app.add_subcommand("bench", "Measure decode and prompt speed at several depths, caches interleaved");
  command->add_option("-m,--model", options.model, "Model, GGUF")->required();
  command->add_option("--depths", options.depths, "Cells already in the cache, of each sequence")
      ->delimiter(',')
      ->capture_default_str();
  command
      ->add_option("--sequences", options.n_sequences,
                   "Sequences that decode a token each in one batch; their prompts are read one after the other")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  command
      ->add_option("--read", options.n_read,
                   "Fill a depth by reading so many tokens and copying their cells, which is quicker; 0: read them all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("--kv", options.caches, "Caches: f16, q8_0, q4_0, bits (2), bits and exact cells (2+64)")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--profile", options.profile,
                      "Calibration of the model (default: <model>.thimble.gguf beside it)");
  add_exact_options(*command, options.window, options.pool, options.small_cells);
  add_context_options(*command, options.context);
  add_device_option(*command, options.device);
  command
      ->add_option("--split-mode", options.split,
                   "How several devices share a model: layer, or tensor (llama.cpp's Meta device)")
      ->transform(CLI::CheckedTransformer(std::map<std::string, llama_split_mode>{
          {"layer", LLAMA_SPLIT_MODE_LAYER}, {"tensor", LLAMA_SPLIT_MODE_TENSOR}}));
  command->add_option("--decode", options.n_decode, "Tokens to decode in a round")->capture_default_str();
  command->add_option("--prompt", options.n_prompt, "Tokens to read in a round")->capture_default_str();
  command->add_option("--rounds", options.rounds)->capture_default_str();
  command->add_option("-t,--threads", options.n_threads)->capture_default_str();
  command->add_option("--json", options.json, "Write the rows here");
  command->callback([] {
    if (options.profile.empty()) options.profile = profile_beside(options.model);
    run(options);
  });
}

}  // namespace thimble
