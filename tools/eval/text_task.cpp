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
  ProgressBar bar(name);
  for (int chunk = 0; chunk < task.n_chunks; chunk++) {
    const llama_token* text = &tokens[size_t(chunk) * task.context];
    session.clear();
    session.decode(text, n_prefill, 0);
    for (int i = 0; i < task.n_decode; i++) {
      const auto start = std::chrono::steady_clock::now();
      std::vector<float> log_p = session.decode(text + n_prefill + i, 1, n_prefill + i);
      seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      decoded(size_t(chunk) * task.n_decode + i, std::move(log_p));
      bar.update((chunk + double(i) / task.n_decode) / task.n_chunks);
    }
  }
  bar.finish();
  return task.n_chunks * task.n_decode / seconds;
}

/// The token behind decode step `at`.
int next_token(const TextTask& task, const std::vector<int32_t>& tokens, size_t at) {
  const size_t chunk = at / task.n_decode, i = at % task.n_decode;
  return tokens[chunk * task.context + task.context - task.n_decode + i + 1];
}

ExactRun run_exactly(const TextTask& task, const SessionOptions& options, const EvalCache& f16) {
  ExactRun exact;
  exact.n_decode = task.n_decode;
  Session session(options, f16, task.context);
  exact.tokens = tokenize(session.model(), read_text(task.text));
  const size_t n = size_t(task.context) * task.n_chunks + 1;
  if (exact.tokens.size() < n) {
    throw std::runtime_error("the text has " + std::to_string(exact.tokens.size()) +
                             " tokens, too few for the context and chunks asked for");
  }
  exact.tokens.resize(n);
  if (!task.exact_run.empty() && read_exact_run(task.exact_run, exact)) return exact;
  exact.tokens_per_second = decode_chunks(task, session, exact.tokens, f16.name, [&](size_t, std::vector<float> log_p) {
    exact.log_probs.push_back(std::move(log_p));
  });
  if (!task.exact_run.empty()) write_exact_run(exact, task.exact_run);
  return exact;
}

/// Mean KL with one layer coded at a time.
json divergence_by_layer(const TextTask& task, const SessionOptions& options, const EvalCache& cache,
                         const ExactRun& exact) {
  json by_layer = json::array();
  const int n_layers = int(options.profile_of(cache).profile->shape.layers.size());
  for (int layer = 0; layer < n_layers; layer++) {
    Session session(options, cache, task.context, layer);
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

json cache_row(const EvalCache& cache, const SessionOptions& options, const ModelShape& shape, int n_cells) {
  const Profile* profile = options.profile_of(cache).get();
  const bool plans = cache.coded && cache.method != Method::tailorkv;
  CacheBytes bytes, lone;  // and as n_cells grows without bound: what was fetched and the window do not count
  if (plans) {
    SessionOptions without = options;
    without.first = without.last = without.pool = 0;
    bytes = planned_bytes(Settings::parse(options.settings(cache)), shape, n_cells);
    lone = planned_bytes(Settings::parse(without.settings(cache)), shape, 64);
  } else {
    EvalCache fetches_none = cache;
    fetches_none.top = 0;
    bytes = cache_bytes(cache, profile, shape, n_cells, options.first + options.last);
    lone = cache_bytes(fetches_none, profile, shape, 64, 0);
  }
  return {{"kv", cache.name},
          {"method", cache.coded ? method_name(cache.method) : "llama.cpp"},
          {"bits_per_value", lone.compute / 64 * 8 / values_of_cell(shape)},
          {"kv_bytes", bytes.compute},
          {"store_bytes", bytes.store}};
}

json measure_text(const TextTask& task, const SessionOptions& options, const std::vector<EvalCache>& caches) {
  if (task.context <= task.n_decode) throw std::runtime_error("--decode must be smaller than the context");
  const ExactRun exact = run_exactly(task, options, caches.front());
  json rows = json::array();
  for (const EvalCache& cache : caches) {
    std::vector<TokenScore> scores;
    const auto score = [&](size_t at, const std::vector<float>& log_p) {
      scores.push_back(score_token(log_p, exact.log_probs[at], next_token(task, exact.tokens, at)));
    };
    double tokens_per_second = exact.tokens_per_second;
    json row;
    {
      Session session(options, cache, task.context);
      row = cache_row(cache, options, shape_of(session.model(), options.ours.get()), task.context);
      if (&cache == &caches.front()) {
        for (size_t at = 0; at < exact.log_probs.size(); at++) score(at, exact.log_probs[at]);
      } else {
        tokens_per_second = decode_chunks(task, session, exact.tokens, cache.name, score);
      }
    }
    row.update(summarize(scores, task.n_decode));
    row["decode_tok_s"] = tokens_per_second;
    print_row(row);
    if (task.by_layer && cache.coded && cache.method != Method::tailorkv) {
      row["kld_by_layer"] = divergence_by_layer(task, options, cache, exact);
    }
    rows.push_back(row);
  }
  return rows;
}

}  // namespace thimble
