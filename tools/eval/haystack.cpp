#include "eval/haystack.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace thimble {

std::string weave(const std::function<std::string(size_t)>& filler, std::vector<Hidden>& hidden, int n_tokens,
                  const TokenCount& count) {
  int left = n_tokens;
  for (const Hidden& h : hidden) left -= count(h.text);
  if (left < 0) {
    throw std::runtime_error("the context has no room for what is to be hidden in it: ask for more with --context");
  }
  std::vector<std::pair<std::string, int>> chosen;
  int n_text = 0;
  for (size_t i = 0;; i++) {
    std::string text = filler(i);
    const int n = std::max(1, count(text));
    if (n_text + n > left) break;
    chosen.emplace_back(std::move(text), n);
    n_text += n;
  }
  std::string all;
  size_t next = 0;
  const auto hide = [&] {
    Hidden& h = hidden[next++];
    h.at = {all.size(), all.size() + h.text.size()};
    all += h.text;
  };
  int behind = 0;
  for (const auto& [text, n] : chosen) {
    while (next < hidden.size() && behind >= hidden[next].depth * n_text) hide();
    all += text;
    behind += n;
  }
  while (next < hidden.size()) hide();
  return all;
}

std::function<std::string(size_t)> repeated(std::vector<std::string> paragraphs) {
  if (paragraphs.empty()) throw std::runtime_error("the haystack is empty: give a text with --file");
  return [paragraphs = std::move(paragraphs)](size_t i) { return paragraphs[i % paragraphs.size()]; };
}

std::vector<std::string> paragraphs_of(const std::string& text) {
  std::vector<std::string> paragraphs;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.find_first_not_of(" \r\t") != std::string::npos) paragraphs.push_back(line + "\n");
  }
  return paragraphs;
}

std::vector<std::string> noise() {
  return {"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"};
}

Sample fit(int n_tokens, const TokenCount& count, const std::function<Sample(int)>& make) {
  for (int n = n_tokens; n > 0;) {
    Sample sample = make(n);
    int longest = 0;
    for (const Question& question : sample.questions) longest = std::max(longest, count(question.answered()));
    const int over = 2 + count(sample.text) + longest - n_tokens;  // 2: tokens that a model puts before a text
    if (over <= 0) return sample;
    n -= over;
  }
  throw std::runtime_error("the context has no room for a question: ask for more with --context");
}

}  // namespace thimble
