#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "eval/answer_score.h"
#include "eval/chat_prompt.h"
#include "eval/tasks.h"
#include "eval/tool_calls.h"

namespace thimble {
namespace {

using json = nlohmann::json;

constexpr int kMore = 16;  // tokens that a written call may have beyond the right one's

struct ToolScore {
  AnswerScore answer;
  std::vector<double> by_choice;
  double parses = 0, names = 0, right = 0;
};

/// What the model writes behind position `n`, by its most probable tokens, until its first object is complete or the
/// message ends. `log_p` is what it predicts there.
std::string write_call(Session& session, std::vector<float> log_p, int n, int n_tokens) {
  const llama_vocab* vocabulary = llama_model_get_vocab(session.model());
  std::string text;
  for (int i = 0; i < n_tokens && first_object(text).empty(); i++) {
    const auto token = int32_t(std::max_element(log_p.begin(), log_p.end()) - log_p.begin());
    if (llama_vocab_is_eog(vocabulary, token)) break;
    text += piece(session.model(), token);
    log_p = session.decode(&token, 1, n + i);
  }
  return text;
}

void measure_call(Session& session, const ToolCall& call, int n_last, ToolScore& score,
                  const std::function<void(double)>& progress) {
  const Question& question = call.sample.questions.front();
  const int n_call = int(session.tokenizer(/*special=*/true)(question.answered()).size()) + kMore;
  if (n_call > n_last) {
    throw std::runtime_error("calls are taken back: --last must be " + std::to_string(n_call) + " or more");
  }
  const std::vector<llama_token> tokens =
      tokenize(session.model(), call.sample.text, /*add_special=*/true, /*parse_special=*/true);
  const std::vector<float> log_p = session.read(tokens, progress);
  const int n = int(tokens.size());
  const CallCheck check = check_call(write_call(session, log_p, n, n_call), call.right);
  score.parses += check.parses;
  score.names += check.names;
  score.right += check.right;
  session.rewind(n);
  const AnswerScore answer = session.answer(question, n);
  score.answer.add(answer);
  score.by_choice.resize(answer.by_choice.size());
  for (size_t i = 0; i < answer.by_choice.size(); i++) score.by_choice[i] += answer.by_choice[i];
}

json summarize(const ToolScore& score, const std::vector<std::string>& choices) {
  const int n = score.answer.n;
  json row = score.answer.summary();
  row["parses"] = score.parses / n;
  row["names_right"] = score.names / n;
  row["call_right"] = score.right / n;
  json by_choice = json::array();
  for (size_t i = 0; i < choices.size(); i++) {
    by_choice.push_back({{"value", choices[i]}, {"score", score.by_choice[i] / n}});
  }
  row["by_value"] = by_choice;
  return row;
}

}  // namespace

json measure_tools(const ToolsTask& task, const SessionOptions& options, const std::vector<EvalCache>& caches) {
  const CacheLayout layout = read_layout(options.model, options.context);
  json rows = json::array();
  for (const EvalCache& cache : caches) {
    Session session(options, cache, layout);
    const ChatTemplate chat = chat_template(session.model());
    if (rows.empty() && !chat.is_models) {
      std::fprintf(stderr, "this model has no chat template that libllama knows: ChatML is used\n");
    }
    const auto render = [&](const std::vector<Message>& messages) { return render_chat(chat, messages); };
    ToolScore score;
    std::vector<std::string> choices;
    ProgressBar bar(cache.name);
    for (int sample = 0; sample < task.n_samples; sample++) {
      const ToolCall call = make_tool_call(task.context - kMore, task.seed + uint64_t(sample),
                                           session.token_count(/*special=*/true), render);
      choices.clear();
      for (const Choice& choice : call.sample.questions.front().answer) choices.push_back(choice.name);
      measure_call(session, call, options.last, score,
                   [&](double share) { bar.update((sample + share) / task.n_samples); });
    }
    bar.finish();
    json row = cache_row(cache, options, layout);
    row.update(summarize(score, choices));
    row["chat_template"] = chat.is_models ? "the model's" : "chatml";
    const json& exact = rows.empty() ? row : rows.front();
    row["score_ratio"] = row["score"].get<double>() / exact["score"].get<double>();
    std::printf(
        "%-9s %-8s %6.3f bits  score %.4f (x %.4f, chance %.4f)  calls written: %.2f JSON, %.2f right names, "
        "%.2f right\n ",
        cache.name.c_str(), row["method"].get<std::string>().c_str(), row["bits_per_value"].get<double>(),
        row["score"].get<double>(), row["score_ratio"].get<double>(), row["chance"].get<double>(),
        row["parses"].get<double>(), row["names_right"].get<double>(), row["call_right"].get<double>());
    for (const json& v : row["by_value"]) {
      std::printf(" %s %.4f", v["value"].get<std::string>().c_str(), v["score"].get<double>());
    }
    std::printf("\n");
    std::fflush(stdout);
    rows.push_back(row);
  }
  return rows;
}

}  // namespace thimble
