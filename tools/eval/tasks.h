// What `thimble eval` measures; each task returns one row of JSON for each cache, and prints it.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "eval/session.h"

namespace thimble {

/// Decodes a text, teacher-forced, and compares with f16 on the same tokens (eval/text_score.h).
struct TextTask {
  std::string text;
  bool special = false;  // the text spells special tokens, those of a chat template
  int context = 8192, n_decode = 512, n_chunks = 1;
  std::string exact_run;  // file of f16's log-probabilities, written where it is missing; empty: none
  bool by_layer = false;  // also measure the mean KL with one layer coded and the others exact, for each layer
};
/// Sets options.context.n_cells to task.context.
nlohmann::json measure_text(const TextTask& task, const SessionOptions& options, const std::vector<EvalCache>& caches);

/// Asks for keys that are hidden in a long text (eval/needle.h).
struct NeedleTask {
  std::string text;  // the haystack; empty: the sentences that RULER repeats
  int context = 8192, n_samples = 1;
  std::vector<double> depths;
  bool multikey = false;  // all depths' keys in one haystack, or a haystack for each
  uint64_t seed = 1;
};
nlohmann::json measure_needle(const NeedleTask& task, const SessionOptions& options,
                              const std::vector<EvalCache>& caches);

/// The members that every row begins with: kv, method, bits_per_value, kv_bytes, store_bytes.
nlohmann::json cache_row(const EvalCache& cache, const SessionOptions& options, const CacheLayout& layout);

}  // namespace thimble
