#include "service_line.h"

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <sstream>
#include <stdexcept>

#include "host_file.h"
#include "llama_program.h"
#include "paths.h"

namespace thimble {
namespace {

// Quotes a text for a shell where it has characters that a shell may interpret.
std::string word(const std::string& text) {
  const bool plain = text.find_first_not_of(
                         "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
                         "_-+=,./:@") == std::string::npos;
  return plain ? text : in_quotes(text);
}

std::string settings(const std::string& profile) {
  const char* set = std::getenv("THIMBLE_KV");
  std::string text = set && *set ? set : "bits=4";
  if (!profile.empty() && text.find("profile=") == std::string::npos) {
    text += ",profile=" + std::filesystem::absolute(profile).string();
  }
  return text;
}

// The last message of the plugin or, without one, the last line of the program, to be shown where loading failed.
std::string last_line(std::string text) {
  while (!text.empty() && text.back() == '\n') text.pop_back();
  const size_t begin = text.rfind("thimble: ");
  text = text.substr(begin == std::string::npos ? text.rfind('\n') + 1 : begin);
  return text.substr(0, text.find('\n'));
}

}  // namespace

void print_service_line(const std::string& profile, const std::string& llama, const std::string& own_devices) {
  const std::string load = "GGML_BACKEND_PATH=" + word(plugin_path()) + " THIMBLE_KV=" + word(settings(profile));
  std::string program, why_not, said;
  try {
    program = llama_program("llama-server", chosen_llama(llama));
    check_host_file(program);
    // Without --device THIMBLE0, for lack of which a program that cannot load the plugin would end and say less.
    said = output_of(load + " " + in_quotes(program) + " --list-devices 2>&1");
  } catch (const std::runtime_error& error) {
    why_not = error.what();
  }
  const size_t list = said.find("Available devices:");
  const std::string devices = list == std::string::npos ? "" : thimble_devices(said.substr(list));
  std::printf("service          %s LLAMA_ARG_DEVICE=%s LLAMA_ARG_N_GPU_LAYERS=99 LLAMA_ARG_FLASH_ATTN=on\n",
              load.c_str(), (devices.empty() ? own_devices : devices).c_str());
  if (!why_not.empty()) {
    std::printf("                 not checked: %s\n", why_not.c_str());
  } else if (devices.empty()) {
    std::printf("                 %s does not load the plugin: %s\n", program.c_str(), last_line(said).c_str());
  } else {
    std::printf("                 checked: %s lists %s\n", program.c_str(), devices.c_str());
    std::istringstream lines(said.substr(list));
    for (std::string line; std::getline(lines, line);) {  // on what, and by which kernels
      if (line.starts_with("  THIMBLE")) std::printf("               %s\n", line.c_str());
    }
  }
}

}  // namespace thimble
