#include "eval/answer_score.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace thimble {
namespace {

bool has(const Tokens& tokens, int32_t token) {
  return std::find(tokens.begin(), tokens.end(), token) != tokens.end();
}

void insert(Tokens& tokens, int32_t token) {
  if (!has(tokens, token)) tokens.push_back(token);
}

/// The tokens that options have at a place, and the right ones among them. Unless every token counts, only options
/// that agree with the first one up to there.
Step step_at(const std::vector<Tokens>& options, const Choice& choice, size_t at) {
  const Tokens& said = options.front();
  Step step{said[at], -1, choice.every_token, {}, {}};
  for (size_t i = 0; i < options.size(); i++) {
    const Tokens& option = options[i];
    if (option.size() <= at) continue;
    const bool agrees = std::equal(option.begin(), option.begin() + std::ptrdiff_t(at), said.begin());
    if (!choice.every_token && !agrees) continue;
    insert(step.options, option[at]);
    // One of several right options is given before its second token, so that only its own tokens are right there.
    if (int(i) < choice.n_right && agrees) insert(step.right, option[at]);
  }
  return step;
}

struct Probability {
  double right = 0;  // of the right tokens, among all of the options'
  bool is_greatest = false;
};

Probability probability_of(const Step& step, const std::vector<float>& log_p) {
  float greatest = log_p[size_t(step.options.front())];
  for (int32_t token : step.options) greatest = std::max(greatest, log_p[size_t(token)]);
  double right = 0, all = 0;
  Probability p;
  for (int32_t token : step.options) {
    const double weight = std::exp(double(log_p[size_t(token)]) - greatest);
    all += weight;
    if (!has(step.right, token)) continue;
    right += weight;
    p.is_greatest = p.is_greatest || log_p[size_t(token)] >= greatest;
  }
  p.right = right / all;
  return p;
}

}  // namespace

std::vector<Step> steps_of(const Question& question, const Tokenizer& tokenize) {
  std::vector<Step> steps;
  std::string said = question.text;
  for (size_t c = 0; c < question.answer.size(); c++) {
    const Choice& choice = question.answer[c];
    said += choice.before;
    std::vector<Tokens> options;
    for (const std::string& option : choice.options) options.push_back(tokenize(said + option));
    const Tokens& right = options.front();
    // Up to here all options have the same tokens; the first to differ is where the choice begins.
    size_t common = right.size();
    for (const Tokens& tokens : options) {
      const auto last = right.begin() + std::ptrdiff_t(std::min(right.size(), tokens.size()));
      common = std::min(common, size_t(std::mismatch(right.begin(), last, tokens.begin()).first - right.begin()));
    }
    if (common >= right.size()) throw std::runtime_error("this model's tokenizer does not tell answers apart");
    if (steps.size() > common || !std::equal(steps.begin(), steps.end(), right.begin(),
                                             [](const Step& s, int32_t token) { return s.token == token; })) {
      throw std::runtime_error("this model's tokenizer joins an answer with what stands beside it");
    }
    for (size_t at = steps.size(); at < right.size(); at++) {
      Step step = step_at(options, choice, at);
      if (at >= common && step.options.size() > 1) step.choice = int(c);
      steps.push_back(std::move(step));
    }
    said += choice.options.front();
  }
  if (steps.empty() || steps.front().choice >= 0) throw std::runtime_error("a question has no text of its own");
  return steps;
}

AnswerScore score_answer(const std::vector<Step>& steps, const Predict& predict) {
  struct OfChoice {
    double p = 0, chance = 0;  // a sum over places or a product of them
    int n = 0;                 // places of a sum; 1 of a product
  };
  std::vector<OfChoice> choices;
  AnswerScore score;
  score.n = 1;
  score.found = 1;
  std::vector<float> log_p;
  for (const Step& step : steps) {
    if (step.choice >= 0) {
      const Probability p = probability_of(step, log_p);
      const double chance = double(step.right.size()) / double(step.options.size());
      if (choices.empty()) score.first = p.right;
      choices.resize(std::max(choices.size(), size_t(step.choice) + 1));
      OfChoice& choice = choices[size_t(step.choice)];
      if (step.every_token) {
        choice = {choice.p + p.right, choice.chance + chance, choice.n + 1};
      } else {
        choice = {(choice.n ? choice.p : 1) * p.right, (choice.n ? choice.chance : 1) * chance, 1};
      }
      if (!p.is_greatest) score.found = 0;
    }
    if (&step != &steps.back()) log_p = predict(step.token);
  }
  for (const OfChoice& choice : choices) {
    score.by_choice.push_back(choice.p / choice.n);
    score.score += choice.p / choice.n / double(choices.size());
    score.chance += choice.chance / choice.n / double(choices.size());
  }
  return score;
}

void AnswerScore::add(const AnswerScore& other) {
  score += other.score;
  first += other.first;
  chance += other.chance;
  found += other.found;
  n += other.n;
}

nlohmann::json AnswerScore::summary() const {
  return {{"score", score / n}, {"first", first / n}, {"chance", chance / n}, {"found", found / n}, {"questions", n}};
}

}  // namespace thimble
