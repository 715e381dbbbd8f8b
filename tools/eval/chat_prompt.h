// A conversation as a model's own chat template writes it.
#pragma once

#include <llama.h>

#include <string>
#include <vector>

#include "eval/tool_calls.h"

namespace thimble {

struct ChatTemplate {
  std::string text;  // the model's, or the name of one of llama.cpp's
  bool is_models = true;
};

/// The model's template where libllama knows it; ChatML where it does not, or where the model has none.
ChatTemplate chat_template(const llama_model* model);

/// The conversation, up to where the assistant's next message begins.
std::string render_chat(const ChatTemplate& chat_template, const std::vector<Message>& messages);

}  // namespace thimble
