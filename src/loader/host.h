// The ggml of the program that loads the plugin, found at run time.
#pragma once

#include <string>

namespace thimble {

/// The constructor throws std::runtime_error with a sentence that says what is wrong with the host and what to do.
class Host {
public:
  /// `caller`: an address in the code that called ggml_backend_init, the host's libggml or a program that contains it.
  /// Libraries that are opened from now on see that library's symbols. In llama.cpp's programs they would anyway, but
  /// not in an interpreter that loaded libggml as a module.
  explicit Host(const void* caller);

  const std::string& version() const { return version_; }  // of ggml_version(): "0.25.3"
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
