#include "eval/chat_prompt.h"

#include <stdexcept>

namespace thimble {
namespace {

int apply(const std::string& chat_template, const std::vector<Message>& messages, std::string& out) {
  std::vector<llama_chat_message> chat;
  for (const Message& m : messages) chat.push_back({m.role.c_str(), m.content.c_str()});
  return llama_chat_apply_template(chat_template.c_str(), chat.data(), chat.size(), /*add_ass=*/true, out.data(),
                                   int32_t(out.size()));
}

}  // namespace

ChatTemplate chat_template(const llama_model* model) {
  const char* of_model = llama_model_chat_template(model, nullptr);
  std::string buffer(256, '\0');
  if (of_model && apply(of_model, {{"user", "Hello"}}, buffer) > 0) return {of_model, true};
  return {"chatml", false};
}

std::string render_chat(const ChatTemplate& chat_template, const std::vector<Message>& messages) {
  size_t n = 256;
  for (const Message& m : messages) n += m.role.size() + m.content.size() + 64;
  std::string out(n, '\0');
  int written = apply(chat_template.text, messages, out);
  if (written > int(out.size())) {
    out.resize(size_t(written));
    written = apply(chat_template.text, messages, out);
  }
  if (written < 0) throw std::runtime_error("the chat template cannot write the conversation");
  out.resize(size_t(written));
  return out;
}

}  // namespace thimble
