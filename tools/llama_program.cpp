#include "llama_program.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <vector>

#include "paths.h"

namespace thimble {
namespace {

namespace fs = std::filesystem;

bool is_program(const fs::path& path) {
  return fs::is_regular_file(path) && access(path.c_str(), X_OK) == 0;
}

std::vector<fs::path> folders_of_path() {
  const char* path = std::getenv("PATH");
  const std::string text = path ? path : "";
  std::vector<fs::path> folders;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(':', begin), text.size());
    if (end > begin) folders.emplace_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return folders;
}

std::string on_path(const std::string& name) {
  for (const fs::path& folder : folders_of_path()) {
    if (is_program(folder / name)) return (folder / name).string();
  }
  return {};
}

// The folder of llama.cpp's programs that the build has noted, where Thimble was built with a llama.cpp that was there
// before. An installation has no such note.
fs::path folder_of_build() {
  std::ifstream file(fs::path(bin_directory()) / "llama-programs");
  std::string folder;
  std::getline(file, folder);
  return folder;
}

std::string chosen_program(const std::string& name, const std::string& chosen) {
  fs::path path = chosen;
  if (chosen.find('/') == std::string::npos && !fs::is_directory(path)) {
    const std::string found = on_path(chosen);
    if (found.empty()) throw std::runtime_error(chosen + " (--llama or THIMBLE_LLAMA) is neither a folder nor on PATH");
    path = found;
  }
  if (!fs::exists(path)) throw std::runtime_error(chosen + " (--llama or THIMBLE_LLAMA): there is no such file");
  // A file of any other name may be the server: a script that starts it, or a server that was renamed so that a script
  // has its name.
  const std::string file = path.filename();
  const bool is_it = file == name || (name == "llama-server" && file != "llama-completion" && file != "llama-cli");
  if (fs::is_directory(path)) {
    path /= name;
  } else if (!is_it) {
    // If the program is not beside the path, which may be a link, look beside the link's target.
    const fs::path beside = path.parent_path() / name;
    path = is_program(beside) ? beside : fs::canonical(path).parent_path() / name;
  }
  if (!is_program(path)) {
    throw std::runtime_error(path.string() + ", which --llama or THIMBLE_LLAMA leads to, is missing or no program");
  }
  return path.string();
}

}  // namespace

std::string chosen_llama(const std::string& typed) {
  const char* environment = std::getenv("THIMBLE_LLAMA");
  return !typed.empty() || !environment ? typed : environment;
}

std::string llama_program(const std::string& name, const std::string& chosen) {
  if (!chosen.empty()) return chosen_program(name, chosen);
  std::vector<fs::path> folders{bin_directory(), folder_of_build()};
  for (fs::path& folder : folders_of_path()) folders.push_back(folder);
  const char* homebrew = std::getenv("HOMEBREW_PREFIX");
  folders.push_back(fs::path(homebrew ? homebrew : "/home/linuxbrew/.linuxbrew") / "bin");
  const std::string ollama = on_path("ollama");
  if (!ollama.empty()) folders.push_back(fs::canonical(ollama).parent_path().parent_path() / "lib" / "ollama");
  for (const fs::path& folder : folders) {
    if (!folder.empty() && is_program(folder / name)) return (folder / name).string();
  }
  throw std::runtime_error(name +
                           " is neither beside thimble nor on PATH: install llama.cpp, or say where it is with "
                           "--llama or THIMBLE_LLAMA");
}

std::string in_quotes(const std::string& text) {
  std::string out = "'";
  for (char c : text) c == '\'' ? out += "'\\''" : out += c;
  return out + "'";
}

std::string output_of(const std::string& command) {
  std::FILE* pipe = popen(command.c_str(), "r");
  if (!pipe) throw std::runtime_error("cannot start a shell");
  std::string output;
  char buffer[4096];
  for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, pipe)) > 0;) output.append(buffer, n);
  pclose(pipe);
  return output;
}

std::string thimble_devices(const std::string& listed) {
  std::string names;
  for (int i = 0; listed.find("  THIMBLE" + std::to_string(i) + ":") != std::string::npos; i++) {
    names += (names.empty() ? "" : ",") + ("THIMBLE" + std::to_string(i));
  }
  return names;
}

}  // namespace thimble
