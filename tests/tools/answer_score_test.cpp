// Scores of answers, with a model that is made up: tokens are characters.
#include "eval/answer_score.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>

namespace thimble {
namespace {

constexpr int kVocabulary = 128;

Tokens characters(const std::string& text) {
  return {text.begin(), text.end()};
}

/// Log-probabilities that give some tokens theirs and the others very little.
std::vector<float> prediction(const std::map<char, double>& p) {
  std::vector<float> log_p(kVocabulary, std::log(1e-6f));
  for (const auto& [token, value] : p) log_p[size_t(token)] = float(std::log(value));
  return log_p;
}

/// A model that predicts by the text so far.
Predict model(std::map<std::string, std::map<char, double>> by_text) {
  return [by_text, said = std::string()](int32_t token) mutable {
    said += char(token);
    const auto found = by_text.find(said);
    return found == by_text.end() ? std::vector<float>(kVocabulary, std::log(1.0f / kVocabulary))
                                  : prediction(found->second);
  };
}

TEST(AnswerScore, NumbersByEveryDigit) {
  const Question q{"is ", {{"", {"12", "34", "56"}, 1, true, ""}}, {}};
  const std::vector<Step> steps = steps_of(q, characters);
  ASSERT_EQ(steps.size(), 5u);
  EXPECT_EQ(steps[2].choice, -1);
  EXPECT_EQ(steps[3].options, characters("135"));
  EXPECT_EQ(steps[4].options, characters("246"));
  const AnswerScore score =
      score_answer(steps, model({{"is ", {{'1', 0.2}, {'3', 0.1}, {'5', 0.1}}}, {"is 1", {{'2', 0.1}, {'4', 0.3}}}}));
  EXPECT_NEAR(score.first, 0.5, 1e-4);
  EXPECT_NEAR(score.score, (0.5 + 0.25) / 2, 1e-4);
  EXPECT_NEAR(score.chance, 1.0 / 3, 1e-9);
  EXPECT_EQ(score.found, 0) << "4 is more probable than 2";
}

TEST(AnswerScore, WordsOnlyWhereOptionsPart) {
  const Question q{"a", {{"n ", {"apple", "apron", "pear"}, 1, false, ""}}, {}};
  const std::vector<Step> steps = steps_of(q, characters);
  std::vector<size_t> scored;
  for (size_t i = 0; i < steps.size(); i++) {
    if (steps[i].choice >= 0) scored.push_back(i);
  }
  EXPECT_EQ(scored, (std::vector<size_t>{3, 5})) << "a or p; then p or r behind ap";
  const AnswerScore score =
      score_answer(steps, model({{"an ", {{'a', 0.6}, {'p', 0.2}}}, {"an ap", {{'p', 0.3}, {'r', 0.1}}}}));
  EXPECT_NEAR(score.score, 0.75 * 0.75, 1e-4);
  EXPECT_NEAR(score.chance, 0.25, 1e-9);
  EXPECT_EQ(score.found, 1);
}

TEST(AnswerScore, AnyOfTheRightOnesMayComeFirst) {
  const Question q{": ", {{"", {"ax", "by", "cz", "dw"}, 2, true, ""}, {", ", {"by", "cz", "dw"}, 1, true, ""}}, {}};
  const std::vector<Step> steps = steps_of(q, characters);
  EXPECT_EQ(steps[2].right, characters("ab"));
  EXPECT_EQ(steps[3].right, characters("x")) << "a is given then";
  EXPECT_EQ(steps[6].right, characters("b"));
  const AnswerScore score = score_answer(steps, model({{": ", {{'a', 0.1}, {'b', 0.5}, {'c', 0.2}, {'d', 0.2}}},
                                                       {": a", {{'x', 1}}},
                                                       {": ax, ", {{'b', 0.2}, {'c', 0.1}, {'d', 0.1}}},
                                                       {": ax, b", {{'y', 1}}}}));
  EXPECT_NEAR(score.by_choice.at(0), (0.6 + 1) / 2, 1e-4);
  EXPECT_NEAR(score.by_choice.at(1), (0.5 + 1) / 2, 1e-4);
  EXPECT_EQ(score.found, 1);
}

TEST(AnswerScore, AModelThatKnowsNothingScoresAtChance) {
  const Question q{"is ", {{"", {"12", "34", "56"}, 1, true, ""}, {" of ", {"ape", "bee", "cat"}, 2, false, ""}}, {}};
  const AnswerScore score = score_answer(steps_of(q, characters), model({}));
  EXPECT_NEAR(score.score, score.chance, 1e-6);
  EXPECT_NEAR(score.chance, (1.0 / 3 + 2.0 / 3) / 2, 1e-9);
}

TEST(AnswerScore, LastTokenIsNotDecoded) {
  int n = 0;
  const Question q{"is ", {{"", {"12", "34"}, 1, true, ""}}, {}};
  score_answer(steps_of(q, characters), [&](int32_t) {
    n++;
    return std::vector<float>(kVocabulary);
  });
  EXPECT_EQ(n, 4);
}

TEST(AnswerScore, TokenizersThatJoinAreRefused) {
  // "1, " is one token of this one.
  const auto joining = [](const std::string& text) {
    Tokens tokens;
    for (size_t i = 0; i < text.size(); i++) {
      const bool joins = text.compare(i, 3, "1, ") == 0;
      tokens.push_back(joins ? 1 : text[i]);
      i += joins ? 2 : 0;
    }
    return tokens;
  };
  const Question q{"is ", {{"", {"1", "3"}, 1, true, ""}, {", ", {"2", "4"}, 1, true, ""}}, {}};
  EXPECT_THROW(steps_of(q, joining), std::runtime_error);
  EXPECT_NO_THROW(steps_of(q, characters));
  EXPECT_THROW(steps_of({"is ", {{"", {"1", "1"}, 1, true, ""}}, {}}, characters), std::runtime_error);
}

TEST(AnswerScore, SumsAndMeans) {
  AnswerScore sum;
  sum.add({.score = 0.5, .first = 0.2, .chance = 0.1, .found = 1, .n = 1, .by_choice = {}});
  sum.add({.score = 0.7, .first = 0.4, .chance = 0.3, .found = 0, .n = 1, .by_choice = {}});
  const nlohmann::json mean = sum.summary();
  EXPECT_NEAR(mean["score"], 0.6, 1e-9);
  EXPECT_NEAR(mean["first"], 0.3, 1e-9);
  EXPECT_NEAR(mean["chance"], 0.2, 1e-9);
  EXPECT_EQ(mean["found"], 0.5);
  EXPECT_EQ(mean["questions"], 2);
}

}  // namespace
}  // namespace thimble
