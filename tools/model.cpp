#include "model.h"

#include <ggml-backend.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>

#include "paths.h"

namespace thimble {
namespace {

/// Tokens for one call of llama_decode.
class Batch {
public:
  explicit Batch(int n_tokens) : batch_(llama_batch_init(n_tokens, 0, 1)) {}
  ~Batch() { llama_batch_free(batch_); }
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  void add(llama_token token, llama_pos position, llama_seq_id sequence, bool logits) {
    const int i = batch_.n_tokens++;
    batch_.token[i] = token;
    batch_.pos[i] = position;
    batch_.n_seq_id[i] = 1;
    batch_.seq_id[i][0] = sequence;
    batch_.logits[i] = logits;
  }
  /// Runs what was added, and is empty then.
  void run(llama_context* context) {
    const int status = llama_decode(context, batch_);
    batch_.n_tokens = 0;
    if (status) {
      throw std::runtime_error("the model failed to run (llama_decode returned " + std::to_string(status) + ")");
    }
  }

private:
  llama_batch batch_;
};

}  // namespace

void start_llama() {
  llama_log_set(
      [](ggml_log_level level, const char* text, void*) {
        if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
      },
      nullptr);
  ggml_backend_load_all();
  llama_backend_init();
}

void load_plugin() {
  if (ggml_backend_dev_by_name("THIMBLE0")) return;
  if (!ggml_backend_load(plugin_path().c_str()) || !ggml_backend_dev_by_name("THIMBLE0")) {
    throw std::runtime_error("the plugin " + plugin_path() + " does not load");
  }
}

std::vector<std::string> device_names(const std::string& names) {
  std::vector<std::string> list;
  std::istringstream each(names);
  for (std::string name; std::getline(each, name, ',');) list.push_back(name);
  return list;
}

ModelPtr load_model(const std::string& path, const std::string& devices, bool repack, llama_split_mode split) {
  llama_model_params params = llama_model_default_params();
  params.use_extra_bufts = repack;
  std::vector<ggml_backend_dev_t> chosen;
  if (devices == "CPU" && split != LLAMA_SPLIT_MODE_TENSOR) {
    params.n_gpu_layers = 0;
  } else {
    for (const std::string& name : device_names(devices)) {
      chosen.push_back(ggml_backend_dev_by_name(name.c_str()));
      if (!chosen.back()) throw std::runtime_error("no device " + name + " here: is its backend loaded?");
      if (split == LLAMA_SPLIT_MODE_TENSOR && ggml_backend_dev_type(chosen.back()) == GGML_BACKEND_DEVICE_TYPE_CPU) {
        throw std::runtime_error("llama.cpp splits no tensors over the CPU: name GPUs");
      }
    }
    params.n_gpu_layers = 999;
    params.split_mode = split;
  }
  chosen.push_back(nullptr);
  params.devices = chosen.data();
  ModelPtr model(llama_model_load_from_file(path.c_str(), params));
  if (!model)
    throw std::runtime_error("cannot load the model " + path + ": check the path and that it is a GGUF model");
  return model;
}

ModelPtr load_vocabulary(const std::string& path) {
  llama_model_params params = llama_model_default_params();
  params.vocab_only = true;
  ModelPtr model(llama_model_load_from_file(path.c_str(), params));
  if (!model)
    throw std::runtime_error("cannot read the model " + path + ": check the path and that it is a GGUF model");
  return model;
}

ContextPtr make_context(llama_model* model, const llama_context_params& params) {
  ContextPtr context(llama_init_from_model(model, params));
  if (!context) throw std::runtime_error("cannot make a context of " + std::to_string(params.n_ctx) + " tokens");
  return context;
}

std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::vector<llama_token> tokenize(const llama_model* model, const std::string& text, bool add_special,
                                  bool parse_special) {
  const llama_vocab* vocab = llama_model_get_vocab(model);
  std::vector<llama_token> tokens(text.size() + 2);
  const int n = llama_tokenize(vocab, text.data(), int(text.size()), tokens.data(), int(tokens.size()), add_special,
                               parse_special);
  if (n < 0) throw std::runtime_error("cannot tokenize the text");
  tokens.resize(n);
  return tokens;
}

std::string piece(const llama_model* model, llama_token token) {
  const llama_vocab* vocab = llama_model_get_vocab(model);
  std::string text(64, '\0');
  int n = llama_token_to_piece(vocab, token, text.data(), int(text.size()), 0, /*special=*/true);
  if (n < 0) {
    text.resize(size_t(-n));
    n = llama_token_to_piece(vocab, token, text.data(), int(text.size()), 0, /*special=*/true);
  }
  text.resize(size_t(std::max(n, 0)));
  return text;
}

void decode_tokens(llama_context* context, const llama_token* tokens, int n, int first, int n_logits,
                   llama_seq_id sequence) {
  const int n_batch = int(llama_n_batch(context));
  Batch batch(n_batch);
  for (int at = 0; at < n; at += n_batch) {
    const int n_here = std::min(n_batch, n - at);
    for (int i = at; i < at + n_here; i++) batch.add(tokens[i], first + i, sequence, /*logits=*/i >= n - n_logits);
    batch.run(context);
  }
}

void decode_together(llama_context* context, const llama_token* tokens, int n_sequences, int position) {
  Batch batch(n_sequences);
  for (int i = 0; i < n_sequences; i++) batch.add(tokens[i], position, i, /*logits=*/true);
  batch.run(context);
}

void ProgressBar::update(double share) {
  const int percent = int(share * 100);
  if (percent == shown_ || !isatty(STDERR_FILENO)) return;
  shown_ = percent;
  std::fprintf(stderr, "\r%s %3d %%", what_.c_str(), percent);
}

void ProgressBar::finish() {
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  std::fprintf(stderr, "%s%s: %.0f s   \n", isatty(STDERR_FILENO) ? "\r" : "", what_.c_str(), seconds);
}

}  // namespace thimble
