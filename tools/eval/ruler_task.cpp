#include <cstdio>

#include "eval/answer_score.h"
#include "eval/haystack.h"
#include "eval/ruler.h"
#include "eval/shipped_text.h"
#include "eval/tasks.h"

namespace thimble {
namespace {

using json = nlohmann::json;

/// Each task's score, and the mean over tasks: tasks count alike.
json summarize(const std::vector<std::string>& tasks, const std::vector<AnswerScore>& scores) {
  json by_task = json::array();
  AnswerScore total;
  for (size_t i = 0; i < tasks.size(); i++) {
    json of_task = scores[i].summary();
    of_task["task"] = tasks[i];
    by_task.push_back(of_task);
    total.add(scores[i]);
  }
  json row = total.summary();
  row["by_task"] = by_task;
  return row;
}

void print_row(const json& row, const json& exact) {
  std::printf("%-9s %-8s %6.3f bits  score %.4f (x %.4f, chance %.4f)  found %.3f of %d\n",
              row["kv"].get<std::string>().c_str(), row["method"].get<std::string>().c_str(),
              row["bits_per_value"].get<double>(), row["score"].get<double>(), row["score_ratio"].get<double>(),
              row["chance"].get<double>(), row["found"].get<double>(), row["questions"].get<int>());
  for (size_t i = 0; i < row["by_task"].size(); i++) {
    const json &t = row["by_task"][i], &of_exact = exact["by_task"][i];
    std::printf("  %-16s score %.4f (f16 %.4f, chance %.4f)  first %.4f  found %.2f\n",
                t["task"].get<std::string>().c_str(), t["score"].get<double>(), of_exact["score"].get<double>(),
                t["chance"].get<double>(), t["first"].get<double>(), t["found"].get<double>());
  }
  std::fflush(stdout);
}

}  // namespace

json measure_ruler(const RulerTask& task, const SessionOptions& options, const std::vector<EvalCache>& caches) {
  const std::vector<std::string> paragraphs = paragraphs_of(task.text.empty() ? shipped_text() : read_text(task.text));
  const std::vector<std::string>& tasks = task.tasks.empty() ? ruler_tasks() : task.tasks;
  const CacheLayout layout = read_layout(options.model, options.context);
  json rows = json::array();
  std::vector<std::vector<Sample>>
      samples;  // of each task, made before any is read: a context may be too short for one
  for (const EvalCache& cache : caches) {
    Session session(options, cache, layout);
    for (size_t i = samples.size(); i < tasks.size(); i++) {
      samples.emplace_back();
      for (int j = 0; j < task.n_samples; j++) {
        samples[i].push_back(
            make_ruler(tasks[i], {paragraphs, task.context, task.seed + uint64_t(j), session.token_count()}));
      }
    }
    std::vector<AnswerScore> scores(tasks.size());
    ProgressBar bar(cache.name);
    const double n_all = double(task.n_samples) * double(tasks.size());
    double n_done = 0;
    for (size_t i = 0; i < tasks.size(); i++) {
      for (const Sample& sample : samples[i]) {
        const int n = session.read(sample.text, [&](double share) { bar.update((n_done + share) / n_all); });
        for (const Question& question : sample.questions) scores[i].add(session.answer(question, n));
        n_done++;
      }
    }
    bar.finish();
    json row = cache_row(cache, options, layout);
    row.update(summarize(tasks, scores));
    const json& exact = rows.empty() ? row : rows.front();
    row["score_ratio"] = row["score"].get<double>() / exact["score"].get<double>();
    print_row(row, exact);
    rows.push_back(row);
  }
  return rows;
}

}  // namespace thimble
