// What the subcommands share: libllama behind owners that clean up, and errors as exceptions.
#pragma once

#include <llama.h>

#include <chrono>
#include <memory>
#include <string>
#include <vector>

namespace thimble {

struct FreeModel {
  void operator()(llama_model* m) const { llama_model_free(m); }
};
struct FreeContext {
  void operator()(llama_context* c) const { llama_free(c); }
};
using ModelPtr = std::unique_ptr<llama_model, FreeModel>;
using ContextPtr = std::unique_ptr<llama_context, FreeContext>;

/// Sends libllama's log to nowhere but for errors, and loads ggml's backends. Call once.
void start_llama();

/// Registers THIMBLE0, from the plugin beside the program unless GGML_BACKEND_PATH has done so. Throws
/// std::runtime_error where it does not load.
void load_plugin();

/// `device` as ggml names it ("THIMBLE0", "CUDA0"); "CPU" keeps the model off every other device. Throws
/// std::runtime_error where the file or the device is missing. `repack`: lays weights out as this CPU likes
/// them, as llama.cpp's programs do by default; without it, what is computed does not depend on that.
ModelPtr load_model(const std::string& path, const std::string& device, bool repack = true);

/// A model's vocabulary alone, for `tokenize`: quick, whatever the model's size.
ModelPtr load_vocabulary(const std::string& path);

ContextPtr make_context(llama_model* model, const llama_context_params& params);

std::string read_text(const std::string& path);

/// Tokens of a text; with `add_special` the model's beginning-of-sequence token first where it wants one.
std::vector<llama_token> tokenize(const llama_model* model, const std::string& text, bool add_special = true);

/// Runs `n` tokens at positions from `first` on of sequence 0, in batches of n_batch; keeps the logits of the last one
/// where asked for. Throws where libllama fails.
void decode_tokens(llama_context* context, const llama_token* tokens, int n, int first, bool logits_of_last);

/// A line that rewrites itself on a terminal; elsewhere only its end is printed, with the seconds it took.
class ProgressBar {
public:
  explicit ProgressBar(std::string what) : what_(std::move(what)) {}
  void update(double share);
  void finish();

private:
  std::string what_;
  int shown_ = -1;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace thimble
