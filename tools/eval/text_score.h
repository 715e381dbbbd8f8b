// Scores of decoded text: one token's, and their summary as `thimble eval` reports it.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace thimble {

struct TokenScore {
  double nll = 0, exact_nll = 0;  // -log p, in nats, of the text's next token, with the cache and with f16
  double divergence = 0;          // KL(f16's distribution, the cache's), in nats
  bool agrees = true;             // both have the same most probable token
};

/// Scores one token. `log_p` and `exact` are log-probabilities, [vocabulary], with the cache and with f16; `next` is
/// the text's next token.
TokenScore score_token(const std::vector<float>& log_p, const std::vector<float>& exact, int next);

/// The measures of one row: ppl, ppl_ratio (its standard error over tokens as ppl_ratio_error), kld_mean, kld_p99,
/// top1_agreement, kld_by_position, the mean over chunks for each of `n_decode` positions, and log_p, the
/// log-probability of each token that the text goes on with. `scores` [chunk * n_decode].
nlohmann::json summarize(const std::vector<TokenScore>& scores, int n_decode);

/// The means of a list's four quarters.
std::vector<double> quarters(const std::vector<double>& by_position);

/// f16's log-probabilities, kept in a file so that several runs on the same tokens share them.
struct ExactRun {
  std::vector<int32_t> tokens;                // of all chunks, and the one behind them
  int n_decode = 0;                           // how many of the last tokens of each chunk are decoded
  std::vector<std::vector<float>> log_probs;  // [chunk * n_decode][vocabulary]
  double tokens_per_second = 0;
};
void write_exact_run(const ExactRun& run, const std::string& path);
/// Reads the file into `run`; false where there is no such file. Throws std::runtime_error where the file is cut short
/// or has other tokens than `run` has.
bool read_exact_run(const std::string& path, ExactRun& run);

}  // namespace thimble
