#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "eval/answer_score.h"
#include "eval/haystack.h"
#include "eval/needle.h"
#include "eval/tasks.h"

namespace thimble {
namespace {

using json = nlohmann::json;

json summarize(const std::vector<AnswerScore>& scores, const std::vector<double>& depths) {
  json by_depth = json::array();
  AnswerScore total;
  for (size_t i = 0; i < depths.size(); i++) {
    const AnswerScore& s = scores[i];
    by_depth.push_back(
        {{"depth", depths[i]}, {"score", s.score / s.n}, {"first_digit", s.first / s.n}, {"found", s.found / s.n}});
    total.add(s);
  }
  json row = total.summary();
  row["first_digit"] = row["first"];
  row.erase("first");
  row["by_depth"] = by_depth;
  return row;
}

}  // namespace

json measure_needle(const NeedleTask& task, const SessionOptions& options, const std::vector<EvalCache>& caches) {
  constexpr int kRoom = 64;  // for a question and its answer, in tokens; less than the window's last cells
  if (options.last < kRoom) throw std::runtime_error("questions are taken back: --last must be 64 or more");
  const std::vector<std::string> paragraphs = task.text.empty() ? noise() : paragraphs_of(read_text(task.text));
  const CacheLayout layout = read_layout(options.model, options.context);
  json rows = json::array();
  double exact = 0;
  for (const EvalCache& cache : caches) {
    Session session(options, cache, layout);
    std::vector<AnswerScore> scores(task.depths.size());
    ProgressBar bar(cache.name);
    const size_t n_haystacks = task.multikey ? 1 : task.depths.size();
    for (int sample = 0; sample < task.n_samples; sample++) {
      for (size_t i = 0; i < n_haystacks; i++) {
        const std::vector<double> depths = task.multikey ? task.depths : std::vector<double>{task.depths[i]};
        const Sample haystack = make_haystack(paragraphs, depths, task.context - kRoom,
                                              task.seed + uint64_t(sample) * 1000 + i, session.token_count());
        const int n = session.read(haystack.text, [&](double share) {
          bar.update((sample + (double(i) + share) / double(n_haystacks)) / task.n_samples);
        });
        for (size_t j = 0; j < haystack.questions.size(); j++) {
          scores[i + j].add(session.answer(haystack.questions[j], n));
          session.rewind(n);
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
