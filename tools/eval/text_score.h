// Scores of decoded text: one token's, and their summary as `thimble eval` reports it.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace thimble {

struct TokenScore {
  double nll = 0, exact_nll = 0;  // of the token that the text goes on with, by the cache and by f16
  double divergence = 0;          // KL of the distribution from f16's
  bool agrees = true;             // the most probable token is f16's
};

/// From log-probabilities, `exact` being f16's.
TokenScore score_token(const std::vector<float>& log_p, const std::vector<float>& exact, int next);

/// The measures of one row: ppl, ppl_ratio (its standard error over tokens as ppl_ratio_error), kld_mean, kld_p99,
/// top1_agreement, kld_by_position, the mean over chunks for each of `n_decode` positions, and log_p, the
/// log-probability of each token that the text goes on with. `scores` [chunk * n_decode].
nlohmann::json summarize(const std::vector<TokenScore>& scores, int n_decode);

/// The log-probabilities that f16 gives, kept in a file so that several runs on the same tokens share them.
struct ExactRun {
  std::vector<int32_t> tokens;                // of all chunks, and one more
  int n_decode = 0;                           // the last of each chunk
  std::vector<std::vector<float>> log_probs;  // [chunk * n_decode][vocabulary]
  double tokens_per_second = 0;
};
void write_exact_run(const ExactRun& run, const std::string& path);
/// False where there is no such file. Throws std::runtime_error where it is of other tokens than `run` holds, or cut
/// short.
bool read_exact_run(const std::string& path, ExactRun& run);

}  // namespace thimble
