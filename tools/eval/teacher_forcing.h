// Decoding of given tokens one by one, and what a cache's predictions on the way are worth beside f16's.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "eval/session.h"
#include "eval/text_score.h"

namespace thimble {

/// Which tokens are decoded: the last `n_decode` of each of `n_chunks` chunks of `context` tokens, `n_batch` at once.
struct ForcedRun {
  int context = 8192, n_decode = 512, n_chunks = 1, n_batch = 1;
};

/// Called with each decode step's index and its log-probabilities, [vocabulary].
using Decoded = std::function<void(size_t, std::vector<float>)>;

/// Reads the beginning of every chunk and decodes the rest. `tokens` has those of all chunks and the one behind them.
/// Returns decoded tokens a second.
double decode_chunks(const ForcedRun& run, Session& session, const std::vector<int32_t>& tokens,
                     const std::string& name, const Decoded& decoded);

/// A row for each cache, with the members of `summarize`, printed as they are made. The first cache is f16, whose
/// predictions `exact` has. `more` adds to a row before the next is made; it may be empty.
nlohmann::json compare_caches(const ForcedRun& run, const SessionOptions& options, const std::vector<EvalCache>& caches,
                              const CacheLayout& layout, const ExactRun& exact,
                              const std::function<void(const EvalCache&, nlohmann::json&)>& more);

}  // namespace thimble
