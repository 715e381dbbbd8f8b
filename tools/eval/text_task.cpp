#include <stdexcept>

#include "eval/tasks.h"
#include "eval/teacher_forcing.h"

namespace thimble {
namespace {

using json = nlohmann::json;

/// The tokens of all chunks, and the one behind them. Throws std::runtime_error where the text has too few.
std::vector<int32_t> tokens_of(const TextTask& task, const SessionOptions& options) {
  std::vector<int32_t> tokens =
      tokenize(load_vocabulary(options.model).get(), read_text(task.text), true, task.special);
  const size_t n = size_t(task.run.context) * task.run.n_chunks + 1;
  if (tokens.size() < n) {
    throw std::runtime_error(task.text + " has " + std::to_string(tokens.size()) + " tokens, but --context " +
                             std::to_string(task.run.context) +
                             (task.run.n_chunks > 1 ? " and --chunks " + std::to_string(task.run.n_chunks) : "") +
                             " need " + std::to_string(n) + ": ask for less or give a longer text");
  }
  tokens.resize(n);
  return tokens;
}

ExactRun run_exactly(const TextTask& task, const SessionOptions& options, const EvalCache& f16,
                     const CacheLayout& layout, std::vector<int32_t> tokens) {
  ExactRun exact;
  exact.n_decode = task.run.n_decode;
  exact.tokens = std::move(tokens);
  if (!task.exact_run.empty() && read_exact_run(task.exact_run, exact)) return exact;
  Session session(options, f16, layout);
  exact.tokens_per_second =
      decode_chunks(task.run, session, exact.tokens, f16.name,
                    [&](size_t, std::vector<float> log_p) { exact.log_probs.push_back(std::move(log_p)); });
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
    decode_chunks(task.run, session, exact.tokens, cache.name + ", layer " + std::to_string(layer),
                  [&](size_t at, const std::vector<float>& log_p) {
                    sum += score_token(log_p, exact.log_probs[at], 0).divergence;
                  });
    by_layer.push_back(sum / double(exact.log_probs.size()));
  }
  return by_layer;
}

}  // namespace

json cache_row(const EvalCache& cache, const SessionOptions& options, const CacheLayout& layout) {
  CacheBytes bytes;
  double bits = 0;  // of a coded number; exact and fetched rows do not count
  if (cache.coded && (cache.method == Method::oscar || cache.method == Method::kvarn)) {
    const Settings settings = Settings::parse(options.settings(cache));
    bytes = published_bytes(cache, settings, layout);
    bits = published_bits(cache, settings, layout);
  } else if (cache.coded && by_plugin(cache.method)) {
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
  if (task.run.context <= task.run.n_decode) throw std::runtime_error("--decode must be smaller than the context");
  std::vector<int32_t> tokens = tokens_of(task, options);
  const CacheLayout layout = read_layout(options.model, options.context);
  const ExactRun exact = run_exactly(task, options, caches.front(), layout, std::move(tokens));
  return compare_caches(task.run, options, caches, layout, exact, [&](const EvalCache& cache, json& row) {
    if (task.by_layer && cache.coded && cache.method != Method::tailorkv) {
      row["kld_by_layer"] = divergence_by_layer(task, options, cache, layout, exact);
    }
  });
}

}  // namespace thimble
