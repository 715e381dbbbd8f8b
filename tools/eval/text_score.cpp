#include "eval/text_score.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <stdexcept>

namespace thimble {
namespace {

double quantile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1, size_t(share * double(values.size())))];
}

struct Header {
  char magic[8] = {'t', 'h', 'i', 'm', 'b', 'l', 'e', '1'};
  uint64_t n_tokens = 0, n_rows = 0, n_vocab = 0;
  uint64_t n_decode = 0;
  double tokens_per_second = 0;
};

}  // namespace

TokenScore score_token(const std::vector<float>& log_p, const std::vector<float>& exact, int next) {
  TokenScore score{-log_p[next], -exact[next], 0, true};
  for (size_t v = 0; v < log_p.size(); v++) {
    score.divergence += std::exp(double(exact[v])) * (double(exact[v]) - log_p[v]);
  }
  score.divergence = std::max(0.0, score.divergence);
  const auto best = [](const std::vector<float>& x) { return std::max_element(x.begin(), x.end()) - x.begin(); };
  score.agrees = best(log_p) == best(exact);
  return score;
}

nlohmann::json summarize(const std::vector<TokenScore>& scores, int n_decode) {
  const double n = double(scores.size());
  double nll = 0, difference = 0, squares = 0, mean = 0, agreements = 0;
  std::vector<double> divergences, by_position(n_decode, 0.0), log_p;
  for (size_t i = 0; i < scores.size(); i++) {
    const double d = scores[i].nll - scores[i].exact_nll;
    nll += scores[i].nll / n;
    log_p.push_back(-scores[i].nll);
    difference += d / n;
    squares += d * d / n;
    mean += scores[i].divergence / n;
    agreements += scores[i].agrees / n;
    divergences.push_back(scores[i].divergence);
    by_position[i % n_decode] += scores[i].divergence * n_decode / n;
  }
  const double ratio = std::exp(difference), deviation = std::sqrt(std::max(0.0, squares - difference * difference));
  return {{"ppl", std::exp(nll)},
          {"ppl_ratio", ratio},
          {"ppl_ratio_error", ratio * deviation / std::sqrt(n)},
          {"kld_mean", mean},
          {"kld_p99", quantile(divergences, 0.99)},
          {"top1_agreement", agreements},
          {"kld_by_position", by_position},
          {"log_p", log_p}};
}

std::vector<double> quarters(const std::vector<double>& by_position) {
  std::vector<double> means;
  for (size_t quarter = 0; quarter < 4; quarter++) {
    const size_t begin = by_position.size() * quarter / 4, end = by_position.size() * (quarter + 1) / 4;
    double sum = 0;
    for (size_t i = begin; i < end; i++) sum += by_position[i];
    means.push_back(end > begin ? sum / double(end - begin) : 0);
  }
  return means;
}

void write_exact_run(const ExactRun& run, const std::string& path) {
  Header header;
  header.n_tokens = run.tokens.size();
  header.n_rows = run.log_probs.size();
  header.n_vocab = run.log_probs.front().size();
  header.n_decode = run.n_decode;
  header.tokens_per_second = run.tokens_per_second;
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(&header), sizeof header);
  file.write(reinterpret_cast<const char*>(run.tokens.data()), std::streamsize(run.tokens.size() * sizeof(int32_t)));
  for (const auto& row : run.log_probs) {
    file.write(reinterpret_cast<const char*>(row.data()), std::streamsize(row.size() * sizeof(float)));
  }
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

bool read_exact_run(const std::string& path, ExactRun& run) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return false;
  Header header;
  const Header expected;
  std::vector<int32_t> tokens(run.tokens.size());
  if (!file.read(reinterpret_cast<char*>(&header), sizeof header) ||
      !std::equal(header.magic, header.magic + 8, expected.magic) || header.n_tokens != tokens.size() ||
      header.n_decode != uint64_t(run.n_decode) ||
      !file.read(reinterpret_cast<char*>(tokens.data()), std::streamsize(tokens.size() * sizeof(int32_t))) ||
      tokens != run.tokens) {
    throw std::runtime_error(path + " is not f16's run on these tokens: remove it, or name another file");
  }
  run.tokens_per_second = header.tokens_per_second;
  run.log_probs.assign(header.n_rows, {});
  for (auto& row : run.log_probs) {
    row.resize(header.n_vocab);
    if (!file.read(reinterpret_cast<char*>(row.data()), std::streamsize(row.size() * sizeof(float)))) {
      throw std::runtime_error(path + " is cut short: remove it");
    }
  }
  return true;
}

}  // namespace thimble
