// `thimble run` and `thimble serve`: they start llama.cpp's own programs with the plugin loaded. Every flag that is not
// Thimble's goes to the program as it is.
#include <gguf.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <stdexcept>

#include "commands.h"
#include "engine/settings.h"
#include "host_file.h"
#include "launch_settings.h"
#include "llama_program.h"
#include "paths.h"

namespace thimble {
namespace {

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

// llama.cpp checks the file too, but its programs often end before the error is written.
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

// llama-server's router takes every GGUF file of a folder for a model. Where profiles lie among the models, this gives
// it a folder of links to the models alone; the plugin follows a link to find the profile beside the model.
void leave_out_profiles(std::vector<std::string>& args) {
  namespace fs = std::filesystem;
  for (size_t i = 0; i + 1 < args.size(); i++) {
    if (args[i] != "--models-dir") continue;
    const fs::path folder = fs::absolute(args[i + 1]);
    const auto is_profile = [](const fs::path& path) { return path.string().ends_with(".thimble.gguf"); };
    std::vector<fs::path> models;
    bool has_profiles = false;
    for (const auto& entry : fs::directory_iterator(folder)) {
      is_profile(entry.path()) ? void(has_profiles = true) : models.push_back(entry.path());
    }
    if (!has_profiles) return;
    std::string links = (fs::temp_directory_path() / "thimble-models-XXXXXX").string();
    if (!mkdtemp(links.data()))
      throw std::runtime_error("cannot make a folder in " + fs::temp_directory_path().string());
    for (const fs::path& model : models) fs::create_symlink(model, fs::path(links) / model.filename());
    std::fprintf(
        stderr,
        "thimble: %s holds profiles, which llama-server would take for models: it gets links to the models in %s\n",
        folder.c_str(), links.c_str());
    args[i + 1] = links;
  }
}

// Sets the environment variables that the plugin reads.
void set_environment(const LaunchFlags& flags, const std::string& model) {
  const char* before = std::getenv("THIMBLE_KV");
  LaunchSettings settings = merge_settings(flags, before ? before : "");
  for (const std::string& note : settings.notes) std::fprintf(stderr, "thimble: %s\n", note.c_str());
  if (!settings.has("profile") && !settings.has("calibrate")) {
    // Without -m, llama-server loads models as they are asked for, and the plugin looks for each one's profile.
    const std::string profile = model.empty() ? "auto" : profile_beside(model);
    if (!profile.empty()) settings.text += (settings.text.empty() ? "profile=" : ",profile=") + profile;
  }
  setenv("THIMBLE_KV", settings.text.c_str(), 1);
  // GGML_BACKEND_PATH names one backend, which must be the plugin. The plugin then loads the one that it named.
  const char* other = std::getenv("GGML_BACKEND_PATH");
  if (other && *other && std::filesystem::path(other).filename() != std::filesystem::path(plugin_path()).filename()) {
    setenv("THIMBLE_BACKEND_PATH", other, 1);
  }
  setenv("GGML_BACKEND_PATH", plugin_path().c_str(), 1);
}

// All devices of the plugin. Only a program that has loaded the plugin knows how many there are. To start one takes a
// moment, so it is not started where there can be only one device.
std::string devices_of(const std::string& program) {
  const std::string device = Settings::from_environment().device;
  const bool several_gpus = std::filesystem::exists("/dev/nvidia1") && device != "CPU";
  if (device.find('+') == std::string::npos && !several_gpus) return "THIMBLE0";
  const std::string names = thimble_devices(output_of(in_quotes(program) + " --list-devices 2>/dev/null"));
  return names.empty() ? "THIMBLE0" : names;
}

// Replaces this process by the program; throws where that fails.
[[noreturn]] void launch(const std::string& program, const LaunchFlags& flags, std::vector<std::string> args) {
  const std::string path = llama_program(program, chosen_llama(flags.llama));
  const std::string model = value_of(args, {"-m", "--model"});
  check_model(model);
  if (flags.kv == "f16") {
    if (!has_flag(args, {"--device", "-dev"})) args.insert(args.end(), {"--device", "none"});
  } else {
    check_host_file(path);
    set_environment(flags, model);
    leave_out_profiles(args);
    if (!has_flag(args, {"--device", "-dev"})) args.insert(args.end(), {"--device", devices_of(path)});
    if (!has_flag(args, {"-ngl", "--gpu-layers", "--n-gpu-layers"})) args.insert(args.end(), {"-ngl", "99"});
    if (!has_flag(args, {"-fa", "--flash-attn"})) args.insert(args.end(), {"-fa", "on"});
  }
  std::vector<char*> argv{const_cast<char*>(path.c_str())};
  for (std::string& arg : args) argv.push_back(arg.data());
  argv.push_back(nullptr);
  execv(path.c_str(), argv.data());
  throw std::runtime_error("cannot start " + path + ": " + std::strerror(errno));
}

CLI::App* add(CLI::App& app, const char* name, const char* what, LaunchFlags& flags) {
  CLI::App* command = app.add_subcommand(name, what);
  command->add_option(
      "--kv", flags.kv,
      "Bits a number of the KV cache: f16, 4 (default), 3, 2, 1.5, 1.25, 1, or K/V; 2+64 keeps all cells in f16 in "
      "RAM besides and attends to the 64 that matter most exactly");
  command->add_option("--window", flags.window, "Last cells of a sequence in full precision (default: 128)");
  command->add_option("--store", flags.store, "Directory of a file for the f16 cells of 2+64, instead of RAM");
  command->add_option("--profile", flags.profile, "Calibration of the model (default: <model>.thimble.gguf beside it)");
  command->add_option("--policy", flags.policy,
                      "Layers that 2+64 retrieves in: all (default), auto (those the profile calls sparse), none");
  command->add_option("--llama", flags.llama,
                      "llama-server or a folder of llama.cpp's programs to start (default: THIMBLE_LLAMA, else the "
                      "programs beside thimble, else those on PATH)");
  command->add_option("--set", flags.set, "Any key=value of THIMBLE_KV, such as small=0; may be repeated")
      ->allow_extra_args(false);
  command->allow_extras();
  return command;
}

}  // namespace

void add_launch_commands(CLI::App& app) {
  static LaunchFlags run_flags, serve_flags;
  CLI::App* run =
      add(app, "run", "Answer a prompt or chat (llama-completion with -p or -f, else llama-cli)", run_flags);
  run->callback([run] {
    const auto args = run->remaining();
    const bool prompt = has_flag(args, {"-p", "--prompt", "-f", "--file"});
    launch(prompt ? "llama-completion" : "llama-cli", run_flags, args);
  });
  CLI::App* serve = add(app, "serve", "Serve the OpenAI API (llama-server)", serve_flags);
  serve->callback([serve] { launch("llama-server", serve_flags, serve->remaining()); });
}

}  // namespace thimble
