// Variable tracking: VAR A = 12345, later VAR B = VAR A, and so on; which variables have the value 12345?
#include <algorithm>

#include "eval/generator.h"
#include "eval/haystack.h"
#include "eval/ruler.h"

namespace thimble {
namespace {

constexpr size_t kChains = 2, kHops = 4;  // RULER's default is one chain
constexpr size_t kVariables = kHops + 1;  // of a chain

Sample build(const RulerInput& input, int n_tokens) {
  Generator random(input.seed);
  const std::vector<std::string> names = random.different(kChains * kVariables, [&] { return random.letters(5); });
  const std::vector<std::string> values = random.different(kChains, [&] { return random.number(5); });
  // Each chain's assignments lie in their order, at depths of their own.
  std::vector<Hidden> hidden;
  for (size_t chain = 0; chain < kChains; chain++) {
    std::vector<double> depths;
    for (size_t i = 0; i < kVariables; i++) depths.push_back(random.share());
    std::sort(depths.begin(), depths.end());
    for (size_t i = 0; i < kVariables; i++) {
      const std::string* name = &names[chain * kVariables + i];
      const std::string value = i == 0 ? values[chain] : "VAR " + name[-1];
      hidden.push_back({"VAR " + *name + " = " + value + "\n", depths[i], {}});
    }
  }
  std::stable_sort(hidden.begin(), hidden.end(), [](const Hidden& a, const Hidden& b) { return a.depth < b.depth; });

  Sample sample;
  sample.text = "Variables get their values in the following text. Keep track of them.\n";
  const size_t intro = sample.text.size();
  sample.text += weave(repeated(noise()), hidden, n_tokens - input.count(sample.text), input.count);
  Question question{"The five variables that have the value " + values[0] + " are: VAR ", {}, {}};
  for (const Hidden& h : hidden) {
    for (size_t i = 0; i < kVariables; i++) {
      if (h.text.starts_with("VAR " + names[i] + " =")) {
        question.evidence.push_back({intro + h.at.begin, intro + h.at.end});
      }
    }
  }
  std::vector<std::string> left = names;
  for (size_t i = 0; i < kVariables; i++) {
    question.answer.push_back({i ? ", VAR " : "", left, int(kVariables - i), false, ""});
    left.erase(left.begin());
  }
  question.depth = double(question.evidence.front().begin) / double(sample.text.size());
  sample.questions.push_back(std::move(question));
  return sample;
}

}  // namespace

Sample make_variables(const RulerInput& input) {
  return fit(input.n_tokens, input.count, [&](int n) { return build(input, n); });
}

}  // namespace thimble
