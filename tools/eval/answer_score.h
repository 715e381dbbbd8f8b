// Scores of answers by probability. Behind a text, a question and its right answer are decoded token by token; where
// the answer chooses, the right tokens' probability counts against that of all tokens that the options have there. A
// small model that would never say the whole answer still gives a signal, and chance is known.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "eval/sample.h"

namespace thimble {

using Tokens = std::vector<int32_t>;
using Tokenizer = std::function<Tokens(const std::string&)>;

/// A token of a question and its right answer.
struct Step {
  int32_t token = 0;
  int choice = -1;  // the answer's choice that this token is a part of; -1: the token is not scored
  bool every_token = false;
  Tokens right, options;  // tokens that lead to a right option, and those that lead to any
};

/// The tokens of a question and its right answer. Throws std::runtime_error where the tokenizer joins an answer with
/// what stands before or behind it, or does not tell its options apart.
std::vector<Step> steps_of(const Question& question, const Tokenizer& tokenize);

/// Of one answer, or the sum over several.
struct AnswerScore {
  /// Of each choice, in the mean over an answer's choices, 0 to 1. A choice by every token has the mean probability of
  /// its right tokens, any other the product over the places where options part: the probability of the right option.
  double score = 0;
  double first = 0;   // probability of the right tokens at the first scored place, which no given token helps
  double chance = 0;  // the score if all tokens of the options were equally probable
  double found = 0;   // 1: the right tokens are the most probable of the options' at every place
  int n = 0;          // answers that are summed up
  std::vector<double> by_choice;  // of one answer: each choice's score

  void add(const AnswerScore& other);
  /// Means: score, first, chance, found; and the number of questions.
  nlohmann::json summary() const;
};

/// Log-probabilities, [vocabulary], of the token behind those that were given.
using Predict = std::function<std::vector<float>(int32_t)>;

/// Gives `predict` all tokens but the last, in order.
AnswerScore score_answer(const std::vector<Step>& steps, const Predict& predict);

}  // namespace thimble
