#include <algorithm>
#include <chrono>
#include <cstdio>
#include <stdexcept>

#include "eval/shipped_text.h"
#include "eval/tasks.h"

namespace thimble {
namespace {

using json = nlohmann::json;

/// The tokens that the continuation stands behind.
std::vector<int32_t> prompt_of(const GenerateTask& task, const llama_model* model, size_t n_tokens) {
  const std::string text = task.text.empty() ? shipped_text() : read_text(task.text);
  std::vector<int32_t> tokens = tokenize(model, text);
  if (tokens.size() < n_tokens && !task.text.empty()) {
    throw std::runtime_error(task.text + " has " + std::to_string(tokens.size()) + " tokens, but a prompt of " +
                             std::to_string(n_tokens) + " is to be read: ask for less or give a longer text");
  }
  const std::vector<int32_t> again = tokenize(model, text, /*add_special=*/false);
  while (tokens.size() < n_tokens) tokens.insert(tokens.end(), again.begin(), again.end());
  tokens.resize(n_tokens);
  return tokens;
}

/// The most probable token that does not end the text.
int32_t greatest(const std::vector<float>& log_p, const llama_vocab* vocabulary) {
  int32_t best = -1;
  for (size_t token = 0; token < log_p.size(); token++) {
    if (best >= 0 && log_p[token] <= log_p[size_t(best)]) continue;
    if (!llama_vocab_is_eog(vocabulary, int32_t(token))) best = int32_t(token);
  }
  return best;
}

/// f16 reads the prompt and goes on by itself.
ExactRun continue_text(const GenerateTask& task, const SessionOptions& options, const EvalCache& f16,
                       const CacheLayout& layout) {
  Session session(options, f16, layout);
  const llama_vocab* vocabulary = llama_model_get_vocab(session.model());
  ExactRun run;
  run.n_decode = task.n_decode;
  const int n_prompt = task.context - task.n_decode;
  run.tokens = prompt_of(task, session.model(), size_t(n_prompt));
  ProgressBar reading(f16.name + ", reading");
  const std::vector<float> first =
      session.decode(run.tokens.data(), n_prompt, 0, [&](int n) { reading.update(double(n) / n_prompt); });
  reading.finish();
  run.tokens.push_back(greatest(first, vocabulary));
  ProgressBar writing(f16.name + ", writing");
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < task.n_decode; i++) {
    run.log_probs.push_back(session.decode(&run.tokens.back(), 1, n_prompt + i));
    run.tokens.push_back(greatest(run.log_probs.back(), vocabulary));
    writing.update(double(i + 1) / task.n_decode);
  }
  writing.finish();
  run.tokens_per_second =
      task.n_decode / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return run;
}

}  // namespace

json measure_generate(const GenerateTask& task, const SessionOptions& options, const std::vector<EvalCache>& caches) {
  if (task.n_decode < 4 || task.context <= task.n_decode) {
    throw std::runtime_error("--decode must be 4 or more, and smaller than the context");
  }
  const CacheLayout layout = read_layout(options.model, options.context);
  const ExactRun exact = continue_text(task, options, caches.front(), layout);
  return compare_caches({task.context, task.n_decode, 1}, options, caches, layout, exact,
                        [&](const EvalCache&, json& row) {
                          const std::vector<double> means = quarters(row["kld_by_position"]);
                          row["kld_by_quarter"] = means;
                          row["kld_growth"] = means[0] > 0 ? json(means[3] / means[0]) : json();
                          std::printf("  kld by quarter %.5f %.5f %.5f %.5f", means[0], means[1], means[2], means[3]);
                          if (means[0] > 0) std::printf(", the last over the first %.3f", means[3] / means[0]);
                          std::printf("\n");
                          std::fflush(stdout);
                        });
}

}  // namespace thimble
