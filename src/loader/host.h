// The ggml of the program that loads the plugin, found at run time.
#pragma once

#include <string>

namespace thimble {

/// Throws std::runtime_error with a sentence on what is wrong with the host and what to do.
class Host {
public:
  /// `caller`: an address in the code that called ggml_backend_init, which is the host's libggml or a program around
  /// it. The symbols of that library become visible to what is opened from here on: llama.cpp's programs have them so,
  /// but an interpreter that loaded libggml as a module does not.
  explicit Host(const void* caller);

  const std::string& version() const { return version_; }  // as ggml_version says it
  bool is_newer_than_tried() const { return is_newer_; }
  int api_version() const { return api_version_; }
  const void* register_function() const { return register_function_; }

private:
  std::string version_;
  bool is_newer_ = false;
  int api_version_ = 0;
  const void* register_function_ = nullptr;
};

}  // namespace thimble
