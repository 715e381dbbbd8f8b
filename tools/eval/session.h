// A context on a model with the cache to measure: one of llama.cpp's own types on a device, or a coded cache, by the
// plugin or emulated.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "devices.h"
#include "eval/answer_score.h"
#include "eval/cache.h"
#include "eval/emulated_cache.h"
#include "layout.h"
#include "model.h"

namespace thimble {

struct CalibratedProfile {
  std::string path;
  std::optional<Profile> profile;  // none: the uncalibrated codec

  const Profile* get() const { return profile ? &*profile : nullptr; }
};

struct SessionOptions {
  std::string model;
  MeasuredDevices devices;
  CalibratedProfile ours, vecinfer, oscar;
  int first = 8;                             // first cells that emulated caches keep exact; they have no pool
  int last = Settings().window.last;         // window= of THIMBLE_KV
  int pool = Settings().window.pool;         // pool= of THIMBLE_KV
  int small_cells = Settings().small_cells;  // small= of THIMBLE_KV
  ContextShape context;                      // the task sets n_cells
  int n_threads = 1;
  std::string policy = "all";  // layers that retrieve
  bool reference = false;      // emulate coded caches

  /// THIMBLE_KV for a coded cache of Thimble's or VecInfer's. An emulated cache, but TailorKV's, codes the layers that
  /// a plan of these settings codes.
  std::string settings(const EvalCache& cache) const;
  const CalibratedProfile& profile_of(const EvalCache& cache) const {
    return cache.method == Method::vecinfer ? vecinfer : cache.method == Method::oscar ? oscar : ours;
  }
};

class Session {
public:
  /// Loads the model as `thimble run` and `thimble serve` do, and makes the context. `only_layer`: the one layer that
  /// is coded, for emulated caches only; -1: all. Throws std::runtime_error.
  Session(const SessionOptions& options, const EvalCache& cache, const CacheLayout& layout, int only_layer = -1);

  void clear();
  /// Removes the tokens from position `n` on, at most as many as the window has last cells.
  void rewind(int n);
  /// Removes the tokens at positions [begin, end), anywhere.
  void forget(int begin, int end);
  /// Runs tokens at positions from `first` on, in batches; returns the log-probabilities, [vocabulary], of the token
  /// behind the last.
  /// `progress` is called with the number of tokens that were run.
  std::vector<float> decode(const llama_token* tokens, int n, int first,
                            const std::function<void(int)>& progress = nullptr);
  /// Runs tokens at positions from `first` on in one batch, which has at most n_batch of them; returns the
  /// log-probabilities, [n][vocabulary], of the token behind each.
  std::vector<std::vector<float>> decode_each(const llama_token* tokens, int n, int first);

  /// Clears the cache and reads a text; `progress` is called with the share that was read. Returns its tokens.
  int read(const std::string& text, const std::function<void(double)>& progress = nullptr);
  /// The same of tokens; returns the log-probabilities, [vocabulary], of the token behind them.
  std::vector<float> read(const std::vector<llama_token>& tokens,
                          const std::function<void(double)>& progress = nullptr);
  /// Scores the answer to a question, from position `first` on; its tokens stay in the cache.
  AnswerScore answer(const Question& question, int first);

  /// Tokens of a text without those that the model puts before it; `special`: with those that a chat template writes.
  Tokenizer tokenizer(bool special = false) const;
  TokenCount token_count(bool special = false) const;
  llama_model* model() const { return model_.get(); }

private:
  std::vector<float> log_probs(int row) const;

  ModelPtr model_;
  std::unique_ptr<EmulatedCache> emulated_;
  ContextPtr context_;
};

}  // namespace thimble
