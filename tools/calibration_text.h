// The text of several kinds that `thimble calibrate` reads where it is given none: the files of a folder (texts/, which
// the installation brings along), and what the model writes itself.
#pragma once

#include <string>
#include <vector>

#include "model.h"

namespace thimble {

struct TextOfKind {
  std::string kind;
  std::vector<llama_token> tokens;
};

/// Takes `n_tokens` of a text, in stretches of `window` that are spread evenly over all of it.
std::vector<llama_token> spread(const std::vector<llama_token>& text, int n_tokens, int window);

/// A kind for each `<kind>.txt` of the folder, in the order of their names, and for each `<kind>.jsonl`, whose lines
/// are chats {"messages": [{"role", "content"}, ...]} that are written in the model's chat template, or as "role:
/// content" where it has none that llama.cpp knows. Throws std::runtime_error where there are none or a file is not as
/// it should be.
std::vector<TextOfKind> texts_of_folder(const llama_model* model, const std::string& folder);

struct OwnText {
  int n_tokens = 2048;
  int length = 256;  // of a sequence
  int n_threads = 1;
  uint64_t seed = 1;
};
/// Text that the model writes itself, all sequences at once, sampled at temperature 1: every other sequence from its
/// first token alone, the others answering users' messages of the chats in the folder, if it has any, in the model's
/// chat template.
std::vector<llama_token> own_text(llama_model* model, const std::string& folder, const OwnText& options);

}  // namespace thimble
