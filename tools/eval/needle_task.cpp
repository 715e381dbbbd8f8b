#include <algorithm>
#include <cmath>
#include <cstdio>
#include <set>
#include <stdexcept>

#include "eval/needle.h"
#include "eval/tasks.h"

namespace thimble {
namespace {

using json = nlohmann::json;

/// A question and its possible answers, as tokens.
struct TokenQuestion {
  std::vector<llama_token> asked;                 // the question, and the tokens that all answers begin with
  std::vector<std::vector<llama_token>> answers;  // the right one first; all of the same number of tokens
};

TokenQuestion tokenize_question(const llama_model* model, const Needle& needle) {
  TokenQuestion out;
  for (const std::string& number : needle.numbers) {
    out.answers.push_back(tokenize(model, question(needle) + number, /*add_special=*/false));
  }
  const auto& right = out.answers.front();
  size_t common = right.size();
  for (const auto& tokens : out.answers) {
    if (tokens.size() != right.size()) throw std::runtime_error("this model's tokenizer cuts numbers unevenly");
    common =
        std::min<size_t>(common, std::mismatch(tokens.begin(), tokens.end(), right.begin()).first - tokens.begin());
  }
  out.asked.assign(right.begin(), right.begin() + common);
  for (auto& tokens : out.answers) tokens.erase(tokens.begin(), tokens.begin() + common);
  return out;
}

struct Score {
  double first = 0, all = 0, found = 0;  // sums over `n` questions
  int n = 0;
};

/// Asks for one needle behind `n_haystack` tokens, and decodes the tokens of question and answer one by one. Scores
/// each token of the answer by its probability among the tokens that the ten numbers have at its place.
void ask(Session& session, const TokenQuestion& q, int n_haystack, Score& score) {
  int at = n_haystack;
  std::vector<float> log_p;
  for (llama_token token : q.asked) log_p = session.decode(&token, 1, at++);
  const auto& right = q.answers.front();
  bool found = true;
  double sum = 0;
  for (size_t i = 0; i < right.size(); i++) {
    std::set<llama_token> tokens;
    for (const auto& answer : q.answers) tokens.insert(answer[i]);
    double all = 0;
    for (llama_token token : tokens) {
      all += std::exp(double(log_p[token]));
      found = found && log_p[token] <= log_p[right[i]];
    }
    const double p = std::exp(double(log_p[right[i]])) / all;
    sum += p;
    if (i == 0) score.first += p;
    if (i + 1 < right.size()) log_p = session.decode(&right[i], 1, at++);
  }
  score.all += sum / double(right.size());
  score.found += found;
  score.n++;
  session.rewind(n_haystack);
}

json summarize(const std::vector<Score>& scores, const std::vector<double>& depths) {
  json by_depth = json::array();
  Score total;
  for (size_t i = 0; i < depths.size(); i++) {
    const Score& s = scores[i];
    by_depth.push_back(
        {{"depth", depths[i]}, {"score", s.all / s.n}, {"first_digit", s.first / s.n}, {"found", s.found / s.n}});
    total = {total.first + s.first, total.all + s.all, total.found + s.found, total.n + s.n};
  }
  return {{"score", total.all / total.n},
          {"first_digit", total.first / total.n},
          {"found", total.found / total.n},
          {"questions", total.n},
          {"by_depth", by_depth}};
}

}  // namespace

json measure_needle(const NeedleTask& task, const SessionOptions& options, const std::vector<EvalCache>& caches) {
  constexpr int kRoom = 64;  // for a question and its answer, in tokens; less than the window's last cells
  if (options.last < kRoom) throw std::runtime_error("questions are taken back: --last must be 64 or more");
  const std::vector<std::string> paragraphs = paragraphs_of(task.text.empty() ? "" : read_text(task.text));
  const CacheLayout layout = read_layout(options.model, options.context);
  json rows = json::array();
  double exact = 0;
  for (const EvalCache& cache : caches) {
    Session session(options, cache, layout);
    const auto count = [&](const std::string& text) { return int(tokenize(session.model(), text, false).size()); };
    std::vector<Score> scores(task.depths.size());
    ProgressBar bar(cache.name);
    const size_t n_haystacks = task.multikey ? 1 : task.depths.size();
    for (int sample = 0; sample < task.n_samples; sample++) {
      for (size_t i = 0; i < n_haystacks; i++) {
        const std::vector<double> depths = task.multikey ? task.depths : std::vector<double>{task.depths[i]};
        const Haystack haystack =
            make_haystack(paragraphs, depths, task.context - kRoom, task.seed + uint64_t(sample) * 1000 + i, count);
        const std::vector<llama_token> tokens = tokenize(session.model(), haystack.text);
        session.clear();
        session.decode(tokens.data(), int(tokens.size()), 0, [&](int n) {
          bar.update((sample + (double(i) + double(n) / double(tokens.size())) / double(n_haystacks)) / task.n_samples);
        });
        for (size_t j = 0; j < haystack.needles.size(); j++) {
          ask(session, tokenize_question(session.model(), haystack.needles[j]), int(tokens.size()), scores[i + j]);
        }
      }
    }
    bar.finish();
    json row = cache_row(cache, options, layout);
    row.update(summarize(scores, task.depths));
    if (&cache == &caches.front()) exact = row["score"];
    row["score_ratio"] = row["score"].get<double>() / exact;
    std::printf("%-9s %-8s %6.3f bits  score %.4f (x %.4f)  first digit %.4f  found %.3f of %d\n", cache.name.c_str(),
                row["method"].get<std::string>().c_str(), row["bits_per_value"].get<double>(),
                row["score"].get<double>(), row["score_ratio"].get<double>(), row["first_digit"].get<double>(),
                row["found"].get<double>(), row["questions"].get<int>());
    std::fflush(stdout);
    rows.push_back(row);
  }
  return rows;
}

}  // namespace thimble
