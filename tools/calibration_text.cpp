#include "calibration_text.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>

namespace thimble {
namespace {

namespace fs = std::filesystem;

struct Message {
  std::string role, content;
};
using Chat = std::vector<Message>;

std::vector<Chat> read_chats(const std::string& path) {
  std::vector<Chat> chats;
  std::istringstream lines(read_text(path));
  for (std::string line; std::getline(lines, line);) {
    try {
      Chat chat;
      const nlohmann::json parsed = nlohmann::json::parse(line);  // outlives the loop over a part of it
      for (const nlohmann::json& message : parsed.at("messages")) {
        chat.push_back({message.at("role"), message.at("content")});
      }
      chats.push_back(std::move(chat));
    } catch (const nlohmann::json::exception& e) {
      throw std::runtime_error(
          path + ": a line is no chat, {\"messages\": [{\"role\": ..., \"content\": ...}, ...]} (" + e.what() + ")");
    }
  }
  return chats;
}

/// A chat in the model's template; with `asks`, up to where the assistant's answer begins.
std::string in_template(const llama_model* model, const Chat& chat, bool asks) {
  std::vector<llama_chat_message> messages;
  size_t size = 256;
  for (const Message& m : chat) {
    messages.push_back({m.role.c_str(), m.content.c_str()});
    size += 2 * (m.role.size() + m.content.size()) + 64;
  }
  if (const char* used = llama_model_chat_template(model, nullptr)) {
    std::string text(size, '\0');
    int n = llama_chat_apply_template(used, messages.data(), messages.size(), asks, text.data(), int(text.size()));
    if (n > int(text.size())) {
      text.resize(n);
      n = llama_chat_apply_template(used, messages.data(), messages.size(), asks, text.data(), n);
    }
    if (n >= 0) return text.substr(0, n);
  }
  std::string text;
  for (const Message& m : chat) text += m.role + ": " + m.content + "\n\n";
  return asks ? text + "assistant:" : text;
}

std::vector<fs::path> files_of(const std::string& folder, const std::string& extension) {
  std::set<fs::path> files;
  if (fs::is_directory(folder)) {
    for (const auto& entry : fs::directory_iterator(folder)) {
      if (entry.path().extension() == extension) files.insert(entry.path());
    }
  }
  return {files.begin(), files.end()};
}

/// What users ask first in the chats of a folder, as prompts of at most `longest` tokens.
std::vector<std::vector<llama_token>> questions_of(const llama_model* model, const std::string& folder, int longest) {
  std::vector<std::vector<llama_token>> questions;
  for (const fs::path& path : files_of(folder, ".jsonl")) {
    for (const Chat& chat : read_chats(path.string())) {
      const auto asked = std::find_if(chat.begin(), chat.end(), [](const Message& m) { return m.role == "user"; });
      if (asked == chat.end()) continue;
      auto tokens = tokenize(model, in_template(model, {*asked}, true), true, true);
      if (int(tokens.size()) <= longest) questions.push_back(std::move(tokens));
    }
  }
  return questions;
}

}  // namespace

std::vector<llama_token> spread(const std::vector<llama_token>& text, int n_tokens, int window) {
  const size_t n_windows = std::max<size_t>(1, size_t(n_tokens) / window);
  if (text.size() <= n_windows * window) return text;
  std::vector<llama_token> chosen;
  const size_t step = (text.size() - window) / n_windows;
  for (size_t w = 0; w < n_windows; w++) {
    chosen.insert(chosen.end(), text.begin() + w * step, text.begin() + w * step + window);
  }
  return chosen;
}

std::vector<TextOfKind> texts_of_folder(const llama_model* model, const std::string& folder) {
  std::vector<TextOfKind> texts;
  for (const fs::path& path : files_of(folder, ".txt")) {
    texts.push_back({path.stem().string(), tokenize(model, read_text(path.string()))});
  }
  for (const fs::path& path : files_of(folder, ".jsonl")) {
    TextOfKind chats{path.stem().string(), {}};
    for (const Chat& chat : read_chats(path.string())) {
      const auto tokens = tokenize(model, in_template(model, chat, false), chats.tokens.empty(), true);
      chats.tokens.insert(chats.tokens.end(), tokens.begin(), tokens.end());
    }
    texts.push_back(std::move(chats));
  }
  if (texts.empty()) {
    throw std::runtime_error("no texts to calibrate on in " + folder +
                             ": name a text with -f, or a folder of .txt and .jsonl files with --texts");
  }
  return texts;
}

std::vector<llama_token> own_text(llama_model* model, const std::string& folder, const OwnText& options) {
  const llama_vocab* vocab = llama_model_get_vocab(model);
  const int length = options.length, n_sequences = std::clamp(options.n_tokens / length, 1, 32);
  llama_context_params params = llama_context_default_params();
  params.n_ctx = uint32_t(n_sequences * length);
  params.n_batch = params.n_ubatch = uint32_t(n_sequences);
  params.n_seq_max = uint32_t(n_sequences);
  params.n_threads = params.n_threads_batch = options.n_threads;
  const ContextPtr context = make_context(model, params);
  llama_batch batch = llama_batch_init(n_sequences, 0, 1);
  const std::unique_ptr<llama_batch, void (*)(llama_batch*)> owner(&batch,
                                                                   [](llama_batch* b) { llama_batch_free(*b); });
  std::mt19937_64 random(options.seed);
  const auto questions = questions_of(model, folder, length / 4);
  std::vector<std::vector<llama_token>> sequences(n_sequences), asked(n_sequences);  // `asked`, last token first
  std::vector<llama_sampler*> samplers;
  const auto ask = [&](int s) {
    if (s % 2 == 0 || questions.empty()) return;
    asked[s] = questions[random() % questions.size()];
    std::reverse(asked[s].begin(), asked[s].end());
  };
  for (int s = 0; s < n_sequences; s++) {
    samplers.push_back(llama_sampler_init_dist(uint32_t(random())));
    ask(s);
    if (!asked[s].empty()) continue;
    // No beginning-of-sequence token: start anywhere in the vocabulary.
    const llama_token bos = llama_vocab_bos(vocab);
    asked[s] = {bos >= 0 ? bos : llama_token(random() % uint64_t(llama_vocab_n_tokens(vocab)))};
  }
  ProgressBar bar("sampling text from the model");
  for (int at = 0; at < length; at++) {
    batch.n_tokens = n_sequences;
    for (int s = 0; s < n_sequences; s++) {
      llama_token token = 0;
      if (!asked[s].empty()) {
        token = asked[s].back();
        asked[s].pop_back();
      } else {
        token = llama_sampler_sample(samplers[s], context.get(), s);
        if (llama_vocab_is_eog(vocab, token)) ask(s);
      }
      sequences[s].push_back(token);
      batch.token[s] = token;
      batch.pos[s] = at;
      batch.n_seq_id[s] = 1;
      batch.seq_id[s][0] = s;
      batch.logits[s] = true;
    }
    if (at + 1 < length && llama_decode(context.get(), batch) != 0) {
      throw std::runtime_error("the model failed to sample a text");
    }
    bar.update(double(at) / length);
  }
  bar.finish();
  for (llama_sampler* sampler : samplers) llama_sampler_free(sampler);
  std::vector<llama_token> text;
  for (const auto& sequence : sequences) text.insert(text.end(), sequence.begin(), sequence.end());
  return text;
}

}  // namespace thimble
