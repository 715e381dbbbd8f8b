#include "plugin/model_profile.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace thimble {

std::vector<std::string> arguments_of_this_process() {
  std::vector<std::string> arguments;
  std::ifstream file("/proc/self/cmdline");
  for (std::string argument; std::getline(file, argument, '\0');) arguments.push_back(argument);
  return arguments;
}

std::string model_of(const std::vector<std::string>& arguments) {
  for (size_t i = 0; i < arguments.size(); i++) {
    const std::string& argument = arguments[i];
    if ((argument == "-m" || argument == "--model") && i + 1 < arguments.size()) return arguments[i + 1];
    if (argument.starts_with("--model=")) return argument.substr(argument.find('=') + 1);
  }
  const char* variable = std::getenv("LLAMA_ARG_MODEL");
  return variable ? variable : "";
}

std::string profile_beside_model(const std::string& model) {
  namespace fs = std::filesystem;
  constexpr int kMostLinks = 40;  // the number of links that Linux follows
  std::error_code error;
  fs::path at = model;
  for (int i = 0; i < kMostLinks && !at.empty(); i++) {
    fs::path profile = at;
    profile.replace_extension(".thimble.gguf");
    if (fs::exists(profile, error)) return profile.string();
    if (!fs::is_symlink(at, error)) return {};
    at = at.parent_path() / fs::read_symlink(at, error);
  }
  return {};
}

}  // namespace thimble
