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
#include "eval/ruler.h"
#include "eval/tasks.h"
#include "paths.h"

namespace thimble {
namespace {

struct Options {
  SessionOptions session;
  std::string device = "CPU", task = "text", file, json;
  int n_decode = 0;  // 0: the task's own
  TextTask text;
  NeedleTask needle;
  RulerTask ruler;
  GenerateTask generate;
  ToolsTask tools;
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
  const auto find = [&](Method method, CalibratedProfile& profile) {
    if (!measures(method)) return;
    const std::string name = method_name(method), ending = "." + name + ".thimble.gguf";
    if (profile.path.empty()) profile.path = profile_beside(options.model, ending.c_str());
    read(profile);
    if (profile.profile && profile.profile->transform == name) return;
    throw std::runtime_error("--method " + name + " needs a profile of its own: thimble calibrate -m MODEL -f TEXT " +
                             "--transform " + name + " -o MODEL" + ending + ", then name it with --" + name +
                             "-profile or leave it beside the model");
  };
  find(Method::vecinfer, options.vecinfer);
  find(Method::oscar, options.oscar);
}

using json = nlohmann::json;

void write_json(const std::string& path, const json& out) {
  std::ofstream file(path);
  file << out.dump(1) << "\n";
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

json describe(const CalibratedProfile& profile) {
  return profile.profile ? profile.profile->transform + ", " + profile.profile->source : "none";
}

/// What every result begins with.
json describe(const Options& options, const std::string& task) {
  const auto name = [](const std::string& path) { return std::filesystem::path(path).filename().string(); };
  const SessionOptions& session = options.session;
  return {{"task", task},
          {"model", name(session.model)},
          {"text", name(options.file)},
          {"context", session.context.n_cells},
          {"sequences", session.context.n_sequences},
          {"unified", session.context.unified},
          {"last", session.last},
          {"pool", session.reference ? 0 : session.pool},
          {"first", session.reference ? session.first : 0},
          {"small", session.small_cells},
          {"threads", session.n_threads},
          {"device", session.devices.plain},
          {"by", session.reference ? "reference" : "plugin"},
          {"policy", session.policy},
          {"profile", describe(session.ours)},
          {"vecinfer_profile", describe(session.vecinfer)},
          {"oscar_profile", describe(session.oscar)}};
}

/// What was asked for, or a task's own number and no more than half of the context.
int decoded_tokens(const Options& options, int of_task) {
  return options.n_decode > 0 ? options.n_decode : std::min(of_task, options.session.context.n_cells / 2);
}

json run_text(Options& options, const std::vector<EvalCache>& caches) {
  if (options.file.empty()) throw std::runtime_error("--task text needs a text: give one with --file");
  if (options.text.by_layer && !options.session.reference) {
    throw std::runtime_error("--by-layer codes one layer at a time, which only --reference can");
  }
  options.text.text = options.file;
  options.text.run.context = options.session.context.n_cells;
  options.text.run.n_decode = decoded_tokens(options, options.text.run.n_decode);
  return {{"decode", options.text.run.n_decode},
          {"batch", options.text.run.n_batch},
          {"chunks", options.text.run.n_chunks},
          {"rows", measure_text(options.text, options.session, caches)}};
}

json run_generate(Options& options, const std::vector<EvalCache>& caches) {
  options.generate.text = options.file;
  options.generate.context = options.session.context.n_cells;
  options.generate.n_decode = decoded_tokens(options, options.generate.n_decode);
  return {{"decode", options.generate.n_decode}, {"rows", measure_generate(options.generate, options.session, caches)}};
}

json run_needle(Options& options, const std::vector<EvalCache>& caches, bool multikey) {
  options.needle.text = options.file;
  options.needle.context = options.session.context.n_cells;
  options.needle.multikey = multikey;
  std::sort(options.needle.depths.begin(), options.needle.depths.end());
  return {{"samples", options.needle.n_samples},
          {"seed", options.needle.seed},
          {"rows", measure_needle(options.needle, options.session, caches)}};
}

template <typename Task>
json run_samples(const Options& options, Task& task, const std::vector<EvalCache>& caches,
                 json (*measure)(const Task&, const SessionOptions&, const std::vector<EvalCache>&)) {
  task.context = options.session.context.n_cells;
  task.n_samples = options.needle.n_samples;
  task.seed = options.needle.seed;
  return {{"samples", task.n_samples}, {"seed", task.seed}, {"rows", measure(task, options.session, caches)}};
}

json run_ruler(Options& options, const std::vector<EvalCache>& caches) {
  options.ruler.text = options.file;
  return run_samples(options, options.ruler, caches, measure_ruler);
}

json run_tools(Options& options, const std::vector<EvalCache>& caches) {
  return run_samples(options, options.tools, caches, measure_tools);
}

json run_task(Options& options, const std::vector<EvalCache>& caches, const std::string& task) {
  json out = describe(options, task);
  out.update(task == "text"       ? run_text(options, caches)
             : task == "generate" ? run_generate(options, caches)
             : task == "ruler"    ? run_ruler(options, caches)
             : task == "tools"    ? run_tools(options, caches)
                                  : run_needle(options, caches, task == "multikey"));
  return out;
}

void run(Options options) {
  options.session.devices = start_llama_on(options.device);
  options.session.context.device = options.session.devices.host;
  if (options.session.reference) {
    std::fprintf(
        stderr,
        "--reference emulates the codec alone, cell by cell: the first %d and the last %d cells stay exact; the "
        "plugin keeps the last and those that matter most\n",
        options.session.first, options.session.last);
  }
  const std::vector<EvalCache> caches = caches_to_measure(options.caches, options.methods);
  find_profiles(options.session, caches);
  json out;
  if (options.task == "all") {
    // A text is measured where there is one; without it the continuation says how far caches are from f16.
    std::vector<std::string> tasks = {"generate", "ruler", "tools"};
    if (!options.file.empty()) tasks.insert(tasks.begin(), "text");
    json results = json::array();
    for (const std::string& task : tasks) {
      std::printf("%s\n", task.c_str());
      results.push_back(run_task(options, caches, task));
      out = {{"results", results}};
      if (!options.json.empty()) write_json(options.json, out);  // what is done is kept
    }
    return;
  }
  out = run_task(options, caches, options.task);
  if (!options.json.empty()) write_json(options.json, out);
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
                   "text: the last tokens of a text; needle: a key hidden in it; multikey: keys at all depths; ruler: "
                   "RULER's thirteen tasks; generate: what f16 writes behind a text; tools: calls of tools; all: text "
                   "(if there is one), generate, ruler and tools")
      ->check(CLI::IsMember({"text", "needle", "multikey", "ruler", "generate", "tools", "all"}))
      ->capture_default_str();
  command->add_option(
      "-f,--file", options->file,
      "Text to measure on; of the needle tasks and of RULER's, the haystack; generate and ruler take one "
      "that is shipped where there is none");
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
  command->add_option("--method", options->methods, "Published methods to measure beside ours")
      ->delimiter(',')
      ->check(CLI::IsMember({"vecinfer", "oscar", "kvarn", "tailorkv"}));
  command->add_option("-p,--profile", session.ours.path,
                      "Calibration of the model (default: <model>.thimble.gguf beside it)");
  command->add_option("--vecinfer-profile", session.vecinfer.path,
                      "The same by VecInfer's recipe (default: <model>.vecinfer.thimble.gguf beside it)");
  command->add_option("--oscar-profile", session.oscar.path,
                      "OSCAR's rotations (default: <model>.oscar.thimble.gguf beside it)");
  command->add_option("--first", session.first, "Exact cells at the start, of emulated caches")->capture_default_str();
  add_exact_options(*command, session.last, session.pool, session.small_cells);
  command->add_option("--policy", session.policy, "Layers that retrieve: all, or auto (those the profile calls sparse)")
      ->check(CLI::IsMember({"all", "auto"}))
      ->capture_default_str();
  command->add_flag("--reference", session.reference, "Emulate coded caches inside f16 ones, without the plugin");
  add_device_option(*command, options->device);
  command->add_option("-t,--threads", session.n_threads)->capture_default_str();
  command->add_option("--json", options->json, "Write the rows here");

  command
      ->add_option(
          "--decode", options->n_decode,
          "text, generate: tokens to decode one by one (default: text 512, generate 2048, at most half of the context)")
      ->check(CLI::Range(1, 1 << 30));
  command
      ->add_option("--batch", options->text.run.n_batch,
                   "text: tokens to decode at once (8: as with a draft model; 512: as prompts are read)")
      ->check(CLI::Range(1, ContextShape().n_batch))
      ->capture_default_str();
  command->add_option("--chunks", options->text.run.n_chunks, "text: stretches of text to measure")
      ->capture_default_str();
  command->add_option("--exact-run", options->text.exact_run,
                      "text: file of what f16 predicts, made where it is missing, to be shared by several runs");
  command->add_flag("--special", options->text.special,
                    "text: parse the special tokens that the text spells, as of chats in the model's template");
  command->add_flag("--by-layer", options->text.by_layer, "text: KL with each layer coded alone, with --reference");
  command->add_option("--depths", options->needle.depths, "needle: where keys are hidden, 0 to 1")
      ->delimiter(',')
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command->add_option("--samples", options->needle.n_samples, "needle, ruler, tools: texts for each")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--seed", options->needle.seed, "needle, ruler, tools: of what is hidden")->capture_default_str();
  command->add_option("--ruler", options->ruler.tasks, "ruler: which of its tasks (default: all)")
      ->delimiter(',')
      ->check(CLI::IsMember(ruler_tasks()));
  command->callback([options] { run(*options); });
}

}  // namespace thimble
