// A long text and the questions behind it, as the generators of eval/ruler.h, eval/needle.h and eval/tool_calls.h make
// them. A question is answered by choosing: each thing that the answer must say has options, so that an answer can be
// scored by probability, and a score by chance is known (eval/answer_score.h).
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace thimble {

/// Tokens of a text, as the model at hand cuts it.
using TokenCount = std::function<int(const std::string&)>;

/// One thing that an answer must say.
struct Choice {
  std::string before;  // what the answer says before it
  /// The right ones first, in the order in which the answer says them; it goes on with the first.
  std::vector<std::string> options;
  int n_right = 1;
  /// Options like numbers, of which no part tells the next: every token of one is scored. Without it only those are at
  /// which options part, since the rest of a word follows from its beginning.
  bool every_token = false;
  std::string name;  // of what is chosen, where scores are told apart by it
};

/// Bytes of a text, [begin, end).
struct Span {
  size_t begin = 0, end = 0;
};

struct Question {
  std::string text;  // with what leads to the answer: "The number of ... is: "
  std::vector<Choice> answer;
  std::vector<Span> evidence;  // the sentences of the sample's text that tell the answer
  double depth = 0;            // the share of the text before the evidence, 0 to 1

  /// The question with its right answer.
  std::string answered() const {
    std::string all = text;
    for (const Choice& choice : answer) all += choice.before + choice.options.front();
    return all;
  }
};

struct Sample {
  std::string text;
  std::vector<Question> questions;  // each is asked behind the text alone
};

}  // namespace thimble
