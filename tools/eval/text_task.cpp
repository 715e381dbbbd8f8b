#include <chrono>
#include <cstdio>
#include <stdexcept>

#include "eval/tasks.h"
#include "eval/text_score.h"

namespace thimble {
namespace {

using json = nlohmann::json;

/// Decodes the last tokens of every chunk; calls `decoded` with each step's index and log-probabilities. Returns
/// decoded tokens a second.
template <typename F>
double decode_chunks(const TextTask& task, Session& session, const std::vector<int32_t>& tokens,
                     const std::string& name, const F& decoded) {
  const int n_prefill = task.context - task.n_decode;
  double seconds = 0;
  for (int chunk = 0; chunk < task.n_chunks; chunk++) {
    const llama_token* text = &tokens[size_t(chunk) * task.context];
    const std::string of = name + (task.n_chunks > 1 ? ", stretch " + std::to_string(chunk + 1) : "");
    session.clear();
    ProgressBar reading(of + ", reading");
    session.decode(text, n_prefill, 0, [&](int n) { reading.update(double(n) / n_prefill); });
    reading.finish();
    ProgressBar decoding(of + ", decoding");
    for (int i = 0; i < task.n_decode; i++) {
      const auto start = std::chrono::steady_clock::now();
      std::vector<float> log_p = session.decode(text + n_prefill + i, 1, n_prefill + i);
      seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      decoded(size_t(chunk) * task.n_decode + i, std::move(log_p));
      decoding.update(double(i + 1) / task.n_decode);
    }
    decoding.finish();
  }
  return task.n_chunks * task.n_decode / seconds;
}

/// The token behind decode step `at`.
int next_token(const TextTask& task, const std::vector<int32_t>& tokens, size_t at) {
  const size_t chunk = at / task.n_decode, i = at % task.n_decode;
  return tokens[chunk * task.context + task.context - task.n_decode + i + 1];
}

/// The tokens of all chunks, and the one behind them. Throws std::runtime_error where the text has too few.
std::vector<int32_t> tokens_of(const TextTask& task, const SessionOptions& options) {
  std::vector<int32_t> tokens = tokenize(load_vocabulary(options.model).get(), read_text(task.text), true, task.special);
  const size_t n = size_t(task.context) * task.n_chunks + 1;
  if (tokens.size() < n) {
    throw std::runtime_error(task.text + " has " + std::to_string(tokens.size()) + " tokens, but --context " +
                             std::to_string(task.context) +
                             (task.n_chunks > 1 ? " and --chunks " + std::to_string(task.n_chunks) : "") + " need " +
                             std::to_string(n) + ": ask for less or give a longer text");
  }
  tokens.resize(n);
  return tokens;
}

ExactRun run_exactly(const TextTask& task, const SessionOptions& options, const EvalCache& f16,
                     const CacheLayout& layout, std::vector<int32_t> tokens) {
  ExactRun exact;
  exact.n_decode = task.n_decode;
  exact.tokens = std::move(tokens);
  if (!task.exact_run.empty() && read_exact_run(task.exact_run, exact)) return exact;
  Session session(options, f16, layout);
  exact.tokens_per_second = decode_chunks(task, session, exact.tokens, f16.name, [&](size_t, std::vector<float> log_p) {
    exact.log_probs.push_back(std::move(log_p));
  });
  if (!task.exact_run.empty()) write_exact_run(exact, task.exact_run);
  return exact;
}

/// The mean KL with only one layer coded, for each layer.
json divergence_by_layer(const TextTask& task, const SessionOptions& options, const EvalCache& cache,
                         const CacheLayout& layout, const ExactRun& exact) {
  json by_layer = json::array();
  for (int layer = 0; layer < int(layout.layers.size()); layer++) {
    Session session(options, cache, layout, layer);
    double sum = 0;
    decode_chunks(task, session, exact.tokens, cache.name + ", layer " + std::to_string(layer),
                  [&](size_t at, const std::vector<float>& log_p) {
                    sum += score_token(log_p, exact.log_probs[at], 0).divergence;
                  });
    by_layer.push_back(sum / double(exact.log_probs.size()));
  }
  return by_layer;
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

json cache_row(const EvalCache& cache, const SessionOptions& options, const CacheLayout& layout) {
  CacheBytes bytes;
  double bits = 0;  // of a coded number; exact and fetched rows do not count
  if (cache.coded && cache.method != Method::tailorkv) {
    const Settings settings = Settings::parse(options.settings(cache));
    bytes = planned_bytes(settings, layout);
    bits = planned_bits(settings, layout);
  } else {
    const Profile* profile = options.profile_of(cache).get();
    EvalCache fetches_none = cache;
    fetches_none.top = 0;
    bytes = cache_bytes(cache, profile, layout, options.first + options.last);
    const CacheBytes lone = cache_bytes(fetches_none, profile, CacheLayout::plain(layout.shape, 64), 0);
    bits = lone.compute / 64 * 8 / values_of_cell(layout.shape);
  }
  return {{"kv", cache.name},
          {"method", cache.coded ? method_name(cache.method) : "llama.cpp"},
          {"bits_per_value", bits},
          {"kv_bytes", bytes.compute},
          {"store_bytes", bytes.store}};
}

json measure_text(const TextTask& task, const SessionOptions& options, const std::vector<EvalCache>& caches) {
  if (task.context <= task.n_decode) throw std::runtime_error("--decode must be smaller than the context");
  std::vector<int32_t> tokens = tokens_of(task, options);
  const CacheLayout layout = read_layout(options.model, options.context);
  const ExactRun exact = run_exactly(task, options, caches.front(), layout, std::move(tokens));
  json rows = json::array();
  for (const EvalCache& cache : caches) {
    std::vector<TokenScore> scores;
    const auto score = [&](size_t at, const std::vector<float>& log_p) {
      scores.push_back(score_token(log_p, exact.log_probs[at], next_token(task, exact.tokens, at)));
    };
    double tokens_per_second = exact.tokens_per_second;
    json row;
    {
      row = cache_row(cache, options, layout);
      if (&cache == &caches.front()) {
        for (size_t at = 0; at < exact.log_probs.size(); at++) score(at, exact.log_probs[at]);
      } else {
        Session session(options, cache, layout);
        tokens_per_second = decode_chunks(task, session, exact.tokens, cache.name, score);
      }
    }
    row.update(summarize(scores, task.n_decode));
    row["decode_tok_s"] = tokens_per_second;
    print_row(row);
    if (task.by_layer && cache.coded && cache.method != Method::tailorkv) {
      row["kld_by_layer"] = divergence_by_layer(task, options, cache, layout, exact);
    }
    rows.push_back(row);
  }
  return rows;
}

}  // namespace thimble
