// A context on a model with the cache to measure, however that comes about: llama.cpp's own types on a device, coded
// caches by the plugin or emulated.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

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
  std::string model, device = "CPU";
  CalibratedProfile ours, vecinfer;
  int first = 8;                             // cells that emulated caches keep exact besides the last
  int last = Settings().window.last;         // cells that stay exact
  int pool = Settings().window.pool;         // where the plugin keeps those that matter most
  int small_cells = Settings().small_cells;  // what stays f16 (engine/settings.h)
  ContextShape context;                      // n_cells: the task's
  int n_threads = 1;
  std::string policy = "all";  // layers that retrieve
  bool reference = false;      // emulate coded caches

  /// THIMBLE_KV for a coded cache of ours or VecInfer's. For an emulated one: the plan that it keeps to.
  std::string settings(const EvalCache& cache) const;
  const CalibratedProfile& profile_of(const EvalCache& cache) const {
    return cache.method == Method::vecinfer ? vecinfer : ours;
  }
};

class Session {
public:
  /// On the model as `thimble run` and `thimble serve` load it. `only_layer`: the one layer that is coded, -1 for all;
  /// emulated caches only. Throws std::runtime_error.
  Session(const SessionOptions& options, const EvalCache& cache, const CacheLayout& layout, int only_layer = -1);

  void clear();
  /// Forgets what lies at position `n` and behind. No more than the window's last cells may be forgotten.
  void rewind(int n);
  /// Runs tokens at positions from `first` on, in batches; returns the log-probabilities of what follows the last.
  /// `progress` is called with the number of tokens that were run.
  std::vector<float> decode(const llama_token* tokens, int n, int first,
                            const std::function<void(int)>& progress = nullptr);

  llama_model* model() const { return model_.get(); }

private:
  ModelPtr model_;
  std::unique_ptr<EmulatedCache> emulated_;
  ContextPtr context_;
};

}  // namespace thimble
