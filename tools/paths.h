// Where the parts of an installation or build tree are: all beside the `thimble` program. llama_program.h finds
// llama.cpp's programs, which may be elsewhere.
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

/// The path of `<model>.thimble.gguf` beside a model file or, for a model file of this name, among the profiles that
/// came with the installation; empty where there is none.
inline std::string profile_beside(const std::filesystem::path& model, const char* extension = ".thimble.gguf") {
  if (model.empty()) return {};
  std::filesystem::path profile = model;
  profile.replace_extension(extension);
  if (std::filesystem::exists(profile)) return profile.string();
  profile = std::filesystem::path(bin_directory()) / "profiles" / profile.filename();
  return std::filesystem::exists(profile) ? profile.string() : std::string();
}

}  // namespace thimble
