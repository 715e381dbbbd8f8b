// Which of llama.cpp's programs `thimble` starts.
#pragma once

#include <string>

namespace thimble {

/// The path of program `name` ("llama-server", "llama-completion", "llama-cli").
///
/// `chosen` is what --llama or THIMBLE_LLAMA says, empty where neither does: a folder of llama.cpp's programs, or one
/// of them, whose folder is then meant, or a name to look for in PATH. Without it the program beside `thimble` is
/// taken, else the first on PATH, in Homebrew's folder, or beside Ollama. Throws std::runtime_error with a sentence
/// that says where it was looked for.
std::string llama_program(const std::string& name, const std::string& chosen);

/// --llama as it was typed, or else THIMBLE_LLAMA.
std::string chosen_llama(const std::string& typed);

/// A word for a shell, whatever is in it.
std::string in_quotes(const std::string& text);

/// What a shell command prints. Throws std::runtime_error where no shell can be started.
std::string output_of(const std::string& command);

}  // namespace thimble
