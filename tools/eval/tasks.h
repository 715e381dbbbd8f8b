// What `thimble eval` measures; each task returns one row of JSON for each cache, and prints it.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "eval/session.h"
#include "eval/teacher_forcing.h"

namespace thimble {

/// Decodes a text, teacher-forced, and compares with f16 on the same tokens (eval/text_score.h).
struct TextTask {
  std::string text;
  bool special = false;  // the text spells special tokens, those of a chat template
  ForcedRun run;
  std::string exact_run;  // file of f16's log-probabilities, written where it is missing; empty: none
  bool by_layer = false;  // also measure the mean KL with one layer coded and the others exact, for each layer
};
nlohmann::json measure_text(const TextTask& task, const SessionOptions& options, const std::vector<EvalCache>& caches);

/// Asks for keys that are hidden in a long text (eval/needle.h).
struct NeedleTask {
  std::string text;  // the haystack; empty: the sentences that RULER repeats as noise
  int context = 8192, n_samples = 1;
  std::vector<double> depths;
  bool multikey = false;  // all depths' keys in one haystack, or a haystack for each
  uint64_t seed = 1;
};
nlohmann::json measure_needle(const NeedleTask& task, const SessionOptions& options,
                              const std::vector<EvalCache>& caches);

/// RULER's tasks (eval/ruler.h), a question a text.
struct RulerTask {
  std::string text;                // in which needles are hidden; empty: the shipped text
  std::vector<std::string> tasks;  // empty: all
  int context = 8192, n_samples = 1;
  uint64_t seed = 1;
};
nlohmann::json measure_ruler(const RulerTask& task, const SessionOptions& options,
                             const std::vector<EvalCache>& caches);

/// f16's own greedy continuation of a text, on which every cache is compared with f16: does its error grow while a
/// model writes?
struct GenerateTask {
  std::string text;  // empty: the shipped text, repeated as often as needed
  int context = 8192, n_decode = 2048;
};
/// Rows as measure_text's, with the mean KL of each quarter of the tokens as kld_by_quarter and the last over the first
/// as kld_growth (null where the first is 0, as f16's is).
nlohmann::json measure_generate(const GenerateTask& task, const SessionOptions& options,
                                const std::vector<EvalCache>& caches);

/// Calls of tools in a long conversation (eval/tool_calls.h).
struct ToolsTask {
  int context = 8192, n_samples = 1;
  uint64_t seed = 1;
};
nlohmann::json measure_tools(const ToolsTask& task, const SessionOptions& options,
                             const std::vector<EvalCache>& caches);

/// The members that every row begins with: kv, method, bits_per_value, kv_bytes, store_bytes.
nlohmann::json cache_row(const EvalCache& cache, const SessionOptions& options, const CacheLayout& layout);

}  // namespace thimble
