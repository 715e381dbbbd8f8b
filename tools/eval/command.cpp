// `thimble eval`: what a cache costs in quality. The context is read in batches, the tokens behind it are decoded one
// by one, and every cache is compared with f16 on the same tokens.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <thread>

#include "commands.h"
#include "context_options.h"
#include "eval/tasks.h"
#include "paths.h"

namespace thimble {
namespace {

struct Options {
  SessionOptions session;
  std::string task = "text", file, json;
  TextTask text;
  NeedleTask needle;
  std::vector<std::string> caches = {"f16", "q8_0", "q4_0", "4", "2", "1"}, methods;
};

void read(CalibratedProfile& profile) {
  if (!profile.path.empty()) profile.profile = read_profile(profile.path);
}

void find_profiles(SessionOptions& options, const std::vector<EvalCache>& caches) {
  const auto measures = [&](Method m) {
    return std::any_of(caches.begin(), caches.end(), [&](const EvalCache& c) { return c.coded && c.method == m; });
  };
  const bool plugin = !options.reference && (measures(Method::thimble) || measures(Method::vecinfer));
  if (plugin) load_plugin();
  if (options.ours.path.empty()) options.ours.path = profile_beside(options.model);
  read(options.ours);
  if (!measures(Method::vecinfer)) return;
  if (options.vecinfer.path.empty()) options.vecinfer.path = profile_beside(options.model, ".vecinfer.thimble.gguf");
  read(options.vecinfer);
  if (!options.vecinfer.profile || options.vecinfer.profile->transform != "vecinfer") {
    throw std::runtime_error(
        "--method vecinfer needs a profile of its own: thimble calibrate -m MODEL -f TEXT --transform vecinfer -o "
        "MODEL.vecinfer.thimble.gguf, then name it with --vecinfer-profile or leave it beside the model");
  }
}

nlohmann::json describe(const CalibratedProfile& profile) {
  return profile.profile ? profile.profile->transform + ", " + profile.profile->source : "none";
}

void run(Options options) {
  start_llama();
  if (options.session.reference) {
    std::fprintf(
        stderr,
        "--reference emulates the codec alone, cell by cell: the first %d and the last %d cells stay exact; the "
        "plugin keeps the last and those that matter most\n",
        options.session.first, options.session.last);
  }
  const std::vector<EvalCache> caches = caches_to_measure(options.caches, options.methods);
  find_profiles(options.session, caches);
  const auto name = [](const std::string& path) { return std::filesystem::path(path).filename().string(); };
  nlohmann::json out = {{"task", options.task},
                        {"model", name(options.session.model)},
                        {"text", name(options.file)},
                        {"context", options.session.context.n_cells},
                        {"sequences", options.session.context.n_sequences},
                        {"unified", options.session.context.unified},
                        {"last", options.session.last},
                        {"pool", options.session.reference ? 0 : options.session.pool},
                        {"first", options.session.reference ? options.session.first : 0},
                        {"small", options.session.small_cells},
                        {"threads", options.session.n_threads},
                        {"by", options.session.reference ? "reference" : "plugin"},
                        {"policy", options.session.policy},
                        {"profile", describe(options.session.ours)},
                        {"vecinfer_profile", describe(options.session.vecinfer)}};
  if (options.task == "text") {
    if (options.file.empty()) throw std::runtime_error("--task text needs a text: give one with --file");
    if (options.text.by_layer && !options.session.reference) {
      throw std::runtime_error("--by-layer codes one layer at a time, which only --reference can");
    }
    options.text.text = options.file;
    options.text.context = options.session.context.n_cells;
    out["decode"] = options.text.n_decode;
    out["chunks"] = options.text.n_chunks;
    out["rows"] = measure_text(options.text, options.session, caches);
  } else {
    options.needle.text = options.file;
    options.needle.context = options.session.context.n_cells;
    options.needle.multikey = options.task == "multikey";
    std::sort(options.needle.depths.begin(), options.needle.depths.end());
    out["samples"] = options.needle.n_samples;
    out["seed"] = options.needle.seed;
    out["rows"] = measure_needle(options.needle, options.session, caches);
  }
  if (!options.json.empty()) std::ofstream(options.json) << out.dump(1) << "\n";
}

}  // namespace

void add_eval_command(CLI::App& app) {
  auto* command = app.add_subcommand("eval", "Measure what a quantized cache costs in quality");
  auto options = std::make_shared<Options>();
  options->session.n_threads = int(std::thread::hardware_concurrency());
  options->needle.depths = {0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95};
  SessionOptions& session = options->session;
  command->add_option("-m,--model", session.model, "Model, GGUF")->required();
  command
      ->add_option("--task", options->task,
                   "text: the last tokens of a text; needle: a key hidden in it; multikey: keys at all depths")
      ->check(CLI::IsMember({"text", "needle", "multikey"}))
      ->capture_default_str();
  command->add_option("-f,--file", options->file, "Text to measure on; of the needle tasks, the haystack");
  command->add_option("-c,--context", session.context.n_cells, "Cells of a sequence")
      ->check(CLI::Range(1, 1 << 30))
      ->capture_default_str();
  add_context_options(*command, session.context);
  command
      ->add_option("--kv", options->caches,
                   "Caches: f16, q8_0, q4_0, bits (2), bits of keys/values (3/1), bits and cells retrieved exactly "
                   "(2+64, 2+64drop)")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--method", options->methods, "Published methods to measure beside ours: vecinfer, tailorkv")
      ->delimiter(',')
      ->check(CLI::IsMember({"vecinfer", "tailorkv"}));
  command->add_option("-p,--profile", session.ours.path,
                      "Calibration of the model (default: <model>.thimble.gguf beside it)");
  command->add_option("--vecinfer-profile", session.vecinfer.path,
                      "The same by VecInfer's recipe (default: <model>.vecinfer.thimble.gguf beside it)");
  command->add_option("--first", session.first, "Exact cells at the start, of emulated caches")->capture_default_str();
  add_exact_options(*command, session.last, session.pool, session.small_cells);
  command->add_option("--policy", session.policy, "Layers that retrieve: all, or auto (those the profile calls sparse)")
      ->check(CLI::IsMember({"all", "auto"}))
      ->capture_default_str();
  command->add_flag("--reference", session.reference, "Emulate coded caches inside f16 ones, without the plugin");
  command->add_option("--device", session.device, "Device of the caches that are llama.cpp's own")
      ->capture_default_str();
  command->add_option("-t,--threads", session.n_threads)->capture_default_str();
  command->add_option("--json", options->json, "Write the rows here");

  command->add_option("--decode", options->text.n_decode, "text: tokens to decode one by one")->capture_default_str();
  command->add_option("--chunks", options->text.n_chunks, "text: stretches of text to measure")->capture_default_str();
  command->add_option("--exact-run", options->text.exact_run,
                      "text: file of what f16 predicts, made where it is missing, to be shared by several runs");
  command->add_flag("--special", options->text.special,
                    "text: parse the special tokens that the text spells, as of chats in the model's template");
  command->add_flag("--by-layer", options->text.by_layer, "text: KL with each layer coded alone, with --reference");
  command->add_option("--depths", options->needle.depths, "needle: where keys are hidden, 0 to 1")
      ->delimiter(',')
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command->add_option("--samples", options->needle.n_samples, "needle: haystacks for each")->capture_default_str();
  command->add_option("--seed", options->needle.seed, "needle: of keys and numbers")->capture_default_str();
  command->callback([options] { run(*options); });
}

}  // namespace thimble
