// Where the parts of an installation or build tree are: all beside the `thimble` program. llama_program.h finds those
// of a llama.cpp that was there before.
#pragma once

#include <filesystem>
#include <string>

namespace thimble {

inline std::string bin_directory() {
  return std::filesystem::read_symlink("/proc/self/exe").parent_path().string();
}

inline std::string plugin_path() {
  return bin_directory() + "/libggml-thimble.so";
}

/// `<model>.thimble.gguf` beside a model file or, of a model of this name that came with the installation, among its
/// profiles; empty where there is none.
inline std::string profile_beside(const std::filesystem::path& model, const char* extension = ".thimble.gguf") {
  if (model.empty()) return {};
  std::filesystem::path profile = model;
  profile.replace_extension(extension);
  if (std::filesystem::exists(profile)) return profile.string();
  profile = std::filesystem::path(bin_directory()) / "profiles" / profile.filename();
  return std::filesystem::exists(profile) ? profile.string() : std::string();
}

}  // namespace thimble
