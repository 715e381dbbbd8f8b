// The subcommands' interface to libllama: owning pointers, and exceptions for errors.
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

/// Silences libllama's log except for errors, and loads ggml's backends. Call once.
void start_llama();

/// Loads the plugin beside the program, unless GGML_BACKEND_PATH has loaded one already. Throws
/// std::runtime_error where it does not load.
void load_plugin();

/// Each of names that are separated by commas.
std::vector<std::string> device_names(const std::string& names);

/// Loads a model. `devices` has ggml's names ("THIMBLE0", "CUDA0,CUDA1"), between which `split` divides the model;
/// "CPU" keeps it off every other device. `repack`: lays weights out for this CPU, as llama.cpp's programs do by
/// default; without it, results do not depend on that layout. Throws std::runtime_error where the file or a device is
/// missing.
ModelPtr load_model(const std::string& path, const std::string& devices, bool repack = true,
                    llama_split_mode split = LLAMA_SPLIT_MODE_LAYER);

/// Loads a model's vocabulary alone, for `tokenize`: quick, whatever the model's size.
ModelPtr load_vocabulary(const std::string& path);

ContextPtr make_context(llama_model* model, const llama_context_params& params);

std::string read_text(const std::string& path);

/// Tokens of a text; with `add_special` the model's beginning-of-sequence token first where it wants one; with
/// `parse_special` special tokens that the text spells, such as those of a chat template, else these are plain text.
std::vector<llama_token> tokenize(const llama_model* model, const std::string& text, bool add_special = true,
                                  bool parse_special = false);
/// The text of a token; special tokens, too, by their names.
std::string piece(const llama_model* model, llama_token token);

/// Runs `n` tokens of a sequence at positions from `first` on, in batches of n_batch; computes the logits of the last
/// `n_logits` of them. Throws std::runtime_error where libllama fails.
void decode_tokens(llama_context* context, const llama_token* tokens, int n, int first, int n_logits,
                   llama_seq_id sequence = 0);

/// Runs a token of each of the sequences 0 to n_sequences - 1 in one batch, at the same position of each, and computes
/// their logits. Throws as decode_tokens does.
void decode_together(llama_context* context, const llama_token* tokens, int n_sequences, int position);

/// A progress line that rewrites itself on a terminal; elsewhere only its end is printed, with the seconds it took.
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
