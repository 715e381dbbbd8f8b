// RULER's two tasks of counting: the ten common words of a list, and the three most frequent ones of a coded text. All
// of the text is the evidence.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "eval/generator.h"
#include "eval/haystack.h"
#include "eval/ruler.h"

namespace thimble {
namespace {

constexpr size_t kCommon = 10;  // words to be found in a list
/// How often the words of a list occur: RULER's numbers, and those for a list that is too short for them.
constexpr size_t kOften = 30, kSeldom = 3, kOftenInShort = 6, kSeldomInShort = 1;
constexpr size_t kFrequent = 3, kCodedOptions = 10;  // words to be found in a coded text, and words to choose among

std::vector<std::string> words(size_t n, int n_syllables, Generator& random) {
  std::vector<std::string> all;
  // Seldom two alike: sorted and made unique instead of compared one by one, as a long list has thousands.
  while (all.size() < n) {
    for (size_t i = all.size(); i < n; i++) all.push_back(random.word(n_syllables));
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
  }
  random.shuffle(all);
  return all;
}

/// What a word takes in a text, in tokens, in the mean of some.
double tokens_of_word(const char* before, int n_syllables, const char* behind, const TokenCount& count) {
  constexpr int kTried = 50;
  Generator random(1);
  std::string text;
  for (int i = 0; i < kTried; i++) text += before + random.word(n_syllables) + behind;
  return double(count(text)) / kTried;
}

/// Choices among `options`, of which the first `n_right` are all to be said.
std::vector<Choice> all_of(std::vector<std::string> options, int n_right, const char* between) {
  std::vector<Choice> choices;
  for (int i = 0; i < n_right; i++) {
    choices.push_back({i ? between : "", options, n_right - i, false, ""});
    options.erase(options.begin());
  }
  return choices;
}

Sample build_common(const RulerInput& input, int n_tokens) {
  Generator random(input.seed);
  const double cost = tokens_of_word("100. ", 3, "\n", input.count);
  const size_t n_items = size_t(std::max(0, n_tokens - 30) / cost);
  const bool is_short = n_items < kCommon * (kOften + kSeldom);
  const size_t often = is_short ? kOftenInShort : kOften, seldom = is_short ? kSeldomInShort : kSeldom;
  const size_t n_seldom = n_items > kCommon * often ? (n_items - kCommon * often) / seldom : 0;
  if (n_seldom < kCommon) throw std::runtime_error("cwe needs a longer context: ask for more with --context");
  const std::vector<std::string> vocabulary = words(kCommon + n_seldom, 3, random);

  std::vector<std::string> list;
  for (size_t i = 0; i < vocabulary.size(); i++) list.insert(list.end(), i < kCommon ? often : seldom, vocabulary[i]);
  random.shuffle(list);
  Sample sample;
  sample.text = "A list of words. Some of them are common in it.\n";
  for (size_t i = 0; i < list.size(); i++) sample.text += std::to_string(i + 1) + ". " + list[i] + "\n";
  const std::vector<std::string> options(vocabulary.begin(), vocabulary.begin() + 2 * kCommon);
  sample.questions.push_back({"The ten words that are the most common in the list are: ",
                              all_of(options, int(kCommon), ", "),
                              {{0, sample.text.size()}}});
  return sample;
}

Sample build_frequent(const RulerInput& input, int n_tokens) {
  constexpr double kZeta2 = 1.6449340668482264;  // the sum of 1/k^2: shares of words fall as 1/k^2
  Generator random(input.seed);
  const double cost = tokens_of_word(" ", 3, "", input.count), cost_of_noise = input.count(" ... ... ... ...") / 4.0;
  const double noise_share = 1 / kZeta2;  // the most frequent "word" is noise
  const double n_words = std::max(0, n_tokens - 40) / (cost * (1 - noise_share) + cost_of_noise * noise_share);
  std::vector<size_t> counts;  // by rank, without the noise
  for (double rank = 2; rank - 1 <= kCodedOptions || counts.back() >= 1; rank++) {
    counts.push_back(size_t(std::lround(n_words / (kZeta2 * rank * rank))));
  }
  while (counts.size() > kCodedOptions && counts.back() < 1) counts.pop_back();
  for (size_t& n : counts) n = std::max<size_t>(n, 1);
  if (counts[kFrequent - 1] <= counts[kFrequent]) {
    throw std::runtime_error("fwe needs a longer context: ask for more with --context");
  }
  const std::vector<std::string> vocabulary = words(counts.size(), 3, random);
  std::vector<std::string> list(size_t(n_words * noise_share), "...");
  for (size_t i = 0; i < counts.size(); i++) list.insert(list.end(), counts[i], vocabulary[i]);
  random.shuffle(list);
  Sample sample;
  sample.text = "A coded text. Some of its words are frequent; dots are no words.\n";
  for (size_t i = 0; i < list.size(); i++) sample.text += (i ? " " : "") + list[i];
  sample.text += "\n";
  const std::vector<std::string> options(vocabulary.begin(), vocabulary.begin() + kCodedOptions);
  sample.questions.push_back({"The three words that are the most frequent in the coded text are: ",
                              all_of(options, int(kFrequent), ", "),
                              {{0, sample.text.size()}}});
  return sample;
}

}  // namespace

Sample make_common_words(const RulerInput& input) {
  return fit(input.n_tokens, input.count, [&](int n) { return build_common(input, n); });
}

Sample make_frequent_words(const RulerInput& input) {
  return fit(input.n_tokens, input.count, [&](int n) { return build_frequent(input, n); });
}

}  // namespace thimble
