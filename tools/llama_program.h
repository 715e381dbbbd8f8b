// Finds llama.cpp's programs.
#pragma once

#include <string>

namespace thimble {

/// The path of program `name` ("llama-server", "llama-completion", "llama-cli").
///
/// `chosen` is the value of --llama or THIMBLE_LLAMA: a folder of llama.cpp's programs, one of the programs (then its
/// folder is searched), or a name to look for in PATH. Where it is empty, the program beside `thimble` is taken, else
/// the first on PATH, in Homebrew's folder, or beside Ollama. Throws std::runtime_error with a sentence that names the
/// places where it looked.
std::string llama_program(const std::string& name, const std::string& chosen);

/// --llama as it was typed, or else THIMBLE_LLAMA.
std::string chosen_llama(const std::string& typed);

/// Quotes a text so that a shell takes it as one word.
std::string in_quotes(const std::string& text);

/// Runs a shell command and returns what it prints. Throws std::runtime_error where no shell can be started.
std::string output_of(const std::string& command);

/// The plugin's devices in what a program's --list-devices printed, as --device takes them: "THIMBLE0,THIMBLE1". Empty
/// where it lists none.
std::string thimble_devices(const std::string& listed);

}  // namespace thimble
