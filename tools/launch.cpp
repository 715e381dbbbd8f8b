// `thimble run` and `thimble serve`: llama.cpp's own programs with the plugin loaded. Every flag that is not ours goes
// to them as it is.
#include <gguf.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <stdexcept>

#include "commands.h"
#include "engine/settings.h"
#include "paths.h"

namespace thimble {
namespace {

struct Launch {
  std::string kv = "4", window = "128", profile, store;
};

bool has_flag(const std::vector<std::string>& args, std::initializer_list<const char*> flags) {
  for (const std::string& arg : args) {
    for (const char* flag : flags) {
      if (arg == flag || arg.starts_with(std::string(flag) + "=")) return true;
    }
  }
  return false;
}

std::string value_of(const std::vector<std::string>& args, std::initializer_list<const char*> flags) {
  for (size_t i = 0; i + 1 < args.size(); i++) {
    for (const char* flag : flags) {
      if (args[i] == flag) return args[i + 1];
    }
  }
  return {};
}

// llama.cpp says what is wrong with a file, too, but often ends before that is written.
void check_model(const std::string& path) {
  if (path.empty()) return;
  if (!std::filesystem::is_regular_file(path)) throw std::runtime_error(path + ": there is no such file");
  const std::unique_ptr<gguf_context, void (*)(gguf_context*)> model(gguf_init_from_file(path.c_str(), {true, nullptr}),
                                                                     gguf_free);
  if (!model) throw std::runtime_error(path + " is no GGUF file, or a damaged one");
  const uint64_t begin = gguf_get_data_offset(model.get()), size = std::filesystem::file_size(path);
  for (int64_t i = 0; i < gguf_get_n_tensors(model.get()); i++) {
    if (begin + gguf_get_tensor_offset(model.get(), i) + gguf_get_tensor_size(model.get(), i) <= size) continue;
    throw std::runtime_error(path + " is cut short: tensor " + gguf_get_tensor_name(model.get(), i) +
                             " ends beyond its " + std::to_string(size) + " bytes");
  }
}

// Becomes the program; returns only where that fails.
[[noreturn]] void launch(const std::string& program, const Launch& options, std::vector<std::string> args) {
  const std::string path = llama_program(program);
  if (!std::filesystem::exists(path)) {
    throw std::runtime_error(path + " is missing: build it with cmake --build <build directory> --target " + program);
  }
  const std::string model = value_of(args, {"-m", "--model"});
  check_model(model);
  if (options.kv == "f16") {
    if (!has_flag(args, {"--device", "-dev"})) args.insert(args.end(), {"--device", "none"});
  } else {
    const size_t plus = options.kv.find('+');  // 2+64: 2 bits and the 64 best cells exactly
    std::string settings = "bits=" + options.kv.substr(0, plus) + ",window=" + options.window;
    if (plus != std::string::npos) settings += ",top=" + options.kv.substr(plus + 1);
    if (!options.store.empty()) settings += ",store=file,path=" + options.store;
    std::string profile = options.profile;
    if (profile.empty()) profile = profile_beside(model);
    if (!profile.empty()) settings += ",profile=" + profile;
    const Settings parsed = Settings::parse(settings);  // says what is wrong before a model is loaded
    if (profile.empty() && std::min(parsed.key_bits, parsed.value_bits) < 3) {
      std::fprintf(
          stderr,
          "thimble: no profile of this model: %s bits without one lose a lot; make one with thimble calibrate -m "
          "MODEL -o MODEL.thimble.gguf\n",
          options.kv.c_str());
    }
    setenv("THIMBLE_KV", settings.c_str(), 1);
    setenv("GGML_BACKEND_PATH", plugin_path().c_str(), 1);
    if (!has_flag(args, {"--device", "-dev"})) args.insert(args.end(), {"--device", "THIMBLE0"});
    if (!has_flag(args, {"-ngl", "--gpu-layers", "--n-gpu-layers"})) args.insert(args.end(), {"-ngl", "99"});
    if (!has_flag(args, {"-fa", "--flash-attn"})) args.insert(args.end(), {"-fa", "on"});
  }
  std::vector<char*> argv{const_cast<char*>(path.c_str())};
  for (std::string& arg : args) argv.push_back(arg.data());
  argv.push_back(nullptr);
  execv(path.c_str(), argv.data());
  throw std::runtime_error("cannot start " + path);
}

CLI::App* add(CLI::App& app, const char* name, const char* what, Launch& options) {
  CLI::App* command = app.add_subcommand(name, what);
  command
      ->add_option(
          "--kv", options.kv,
          "Bits a number of the KV cache: f16, 4, 3, 2, 1.5, 1.25, 1, or K/V; 2+64 keeps all cells in f16 in RAM "
          "besides and attends to the 64 that matter most exactly")
      ->capture_default_str();
  command->add_option("--window", options.window, "Last cells of a sequence in full precision")->capture_default_str();
  command->add_option("--store", options.store, "Directory of a file for the f16 cells of 2+64, instead of RAM");
  command->add_option("--profile", options.profile,
                      "Calibration of the model (default: <model>.thimble.gguf beside it)");
  command->allow_extras();
  return command;
}

}  // namespace

void add_launch_commands(CLI::App& app) {
  static Launch run_options, serve_options;
  CLI::App* run =
      add(app, "run", "Answer a prompt or chat (llama-completion with -p or -f, else llama-cli)", run_options);
  run->callback([run] {
    const auto args = run->remaining();
    const bool prompt = has_flag(args, {"-p", "--prompt", "-f", "--file"});
    launch(prompt ? "llama-completion" : "llama-cli", run_options, args);
  });
  CLI::App* serve = add(app, "serve", "Serve the OpenAI API (llama-server)", serve_options);
  serve->callback([serve] { launch("llama-server", serve_options, serve->remaining()); });
}

}  // namespace thimble
