#include "eval/teacher_forcing.h"

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "eval/tasks.h"

namespace thimble {
namespace {

using json = nlohmann::json;

/// The token behind decode step `at`.
int next_token(const ForcedRun& run, const std::vector<int32_t>& tokens, size_t at) {
  const size_t chunk = at / run.n_decode, i = at % run.n_decode;
  return tokens[chunk * run.context + run.context - run.n_decode + i + 1];
}

void print_row(const json& row) {
  std::printf(
      "%-9s %-8s %6.3f bits %8.2f MB  ppl %8.4f  ratio %.4f +- %.4f  kld %.5f  p99 %.4f  top-1 %.4f  %.1f tok/s\n",
      row["kv"].get<std::string>().c_str(), row["method"].get<std::string>().c_str(),
      row["bits_per_value"].get<double>(), row["kv_bytes"].get<double>() / 1e6, row["ppl"].get<double>(),
      row["ppl_ratio"].get<double>(), row["ppl_ratio_error"].get<double>(), row["kld_mean"].get<double>(),
      row["kld_p99"].get<double>(), row["top1_agreement"].get<double>(), row["decode_tok_s"].get<double>());
  std::fflush(stdout);
}

}  // namespace

double decode_chunks(const ForcedRun& run, Session& session, const std::vector<int32_t>& tokens,
                     const std::string& name, const Decoded& decoded) {
  const int n_prefill = run.context - run.n_decode;
  double seconds = 0;
  for (int chunk = 0; chunk < run.n_chunks; chunk++) {
    const llama_token* text = &tokens[size_t(chunk) * run.context];
    const std::string of = name + (run.n_chunks > 1 ? ", stretch " + std::to_string(chunk + 1) : "");
    session.clear();
    ProgressBar reading(of + ", reading");
    session.decode(text, n_prefill, 0, [&](int n) { reading.update(double(n) / n_prefill); });
    reading.finish();
    ProgressBar decoding(of + ", decoding");
    for (int i = 0; i < run.n_decode; i += run.n_batch) {
      const int n = std::min(run.n_batch, run.n_decode - i);
      const auto start = std::chrono::steady_clock::now();
      std::vector<std::vector<float>> log_p = session.decode_each(text + n_prefill + i, n, n_prefill + i);
      seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      for (int j = 0; j < n; j++) decoded(size_t(chunk) * run.n_decode + i + j, std::move(log_p[j]));
      decoding.update(double(i + n) / run.n_decode);
    }
    decoding.finish();
  }
  return run.n_chunks * run.n_decode / seconds;
}

json compare_caches(const ForcedRun& run, const SessionOptions& options, const std::vector<EvalCache>& caches,
                    const CacheLayout& layout, const ExactRun& exact,
                    const std::function<void(const EvalCache&, json&)>& more) {
  json rows = json::array();
  for (const EvalCache& cache : caches) {
    std::vector<TokenScore> scores;
    const auto score = [&](size_t at, const std::vector<float>& log_p) {
      scores.push_back(score_token(log_p, exact.log_probs[at], next_token(run, exact.tokens, at)));
    };
    double tokens_per_second = exact.tokens_per_second;
    json row = cache_row(cache, options, layout);
    if (&cache == &caches.front()) {
      for (size_t at = 0; at < exact.log_probs.size(); at++) score(at, exact.log_probs[at]);
    } else {
      Session session(options, cache, layout);
      tokens_per_second = decode_chunks(run, session, exact.tokens, cache.name, score);
    }
    row.update(summarize(scores, run.n_decode));
    row["decode_tok_s"] = tokens_per_second;
    print_row(row);
    if (more) more(cache, row);
    rows.push_back(row);
  }
  return rows;
}

}  // namespace thimble
