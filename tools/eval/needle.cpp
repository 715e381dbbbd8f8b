#include "eval/needle.h"

#include <algorithm>
#include <random>
#include <sstream>
#include <stdexcept>

namespace thimble {
namespace {

constexpr int kNumbers = 10, kDigits = 7;

const char* const kAdjectives[] = {"brave", "calm",   "dusty", "eager", "frozen", "gentle", "hollow", "humble",
                                   "lazy",  "loud",   "merry", "noisy", "orange", "polite", "quiet",  "rusty",
                                   "shiny", "silent", "sour",  "sunny", "tall",   "tiny",   "warm",   "wild"};
const char* const kNouns[] = {"anchor", "apple",  "bridge", "candle", "castle", "dragon", "engine", "feather",
                              "garden", "hammer", "island", "jacket", "kettle", "ladder", "magnet", "mirror",
                              "needle", "ocean",  "parrot", "pencil", "rabbit", "saddle", "temple", "violin"};

// The standard library's distributions and shuffle differ between implementations; these give the same everywhere.
size_t below(size_t n, std::mt19937_64& random) {
  return random() % n;
}

template <typename T>
void shuffle(std::vector<T>& items, std::mt19937_64& random) {
  for (size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[below(i, random)]);
}

/// Ten numbers that differ in every digit.
std::vector<std::string> make_numbers(std::mt19937_64& random) {
  std::vector<std::string> numbers(kNumbers);
  for (int place = 0; place < kDigits; place++) {
    std::vector<char> digits = {'0', '1', '2', '3', '4', '5', '6', '7', '8', '9'};
    shuffle(digits, random);
    for (int i = 0; i < kNumbers; i++) numbers[i] += digits[i];
  }
  return numbers;
}

std::string sentence(const Needle& needle) {
  return question(needle) + needle.numbers.front() + ".\n";
}

}  // namespace

std::string question(const Needle& needle) {
  return "The special magic number for the " + needle.key + " is: ";
}

std::vector<std::string> paragraphs_of(const std::string& text) {
  if (text.empty()) {
    return {"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"};
  }
  std::vector<std::string> paragraphs;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.find_first_not_of(" \r\t") != std::string::npos) paragraphs.push_back(line + "\n");
  }
  return paragraphs;
}

Haystack make_haystack(const std::vector<std::string>& paragraphs, const std::vector<double>& depths, int n_tokens,
                       uint64_t seed, const std::function<int(const std::string&)>& count) {
  if (depths.empty() || depths.size() > kNumbers) throw std::runtime_error("one to ten depths, please");
  if (paragraphs.empty()) throw std::runtime_error("the haystack is empty");
  std::mt19937_64 random(seed);
  std::vector<std::string> keys;
  for (const char* adjective : kAdjectives) {
    for (const char* noun : kNouns) keys.push_back(std::string(adjective) + " " + noun);
  }
  shuffle(keys, random);
  const std::vector<std::string> numbers = make_numbers(random);

  Haystack haystack;
  int left = n_tokens;
  for (size_t i = 0; i < depths.size(); i++) {
    Needle needle{keys[i], depths[i], numbers};
    std::swap(needle.numbers[0], needle.numbers[i]);
    left -= count(sentence(needle));
    haystack.needles.push_back(needle);
  }
  if (left < 0) throw std::runtime_error("the context has no room for so many keys");

  // Adds paragraphs while they fit, and a needle when the share of the text before it has reached its depth.
  std::vector<std::pair<std::string, int>> chosen;
  int n_text = 0;
  for (size_t i = 0;; i++) {
    const std::string& paragraph = paragraphs[i % paragraphs.size()];
    const int n = std::max(1, count(paragraph));
    if (n_text + n > left) break;
    chosen.emplace_back(paragraph, n);
    n_text += n;
  }
  size_t next = 0;
  int behind = 0;
  for (const auto& [paragraph, n] : chosen) {
    while (next < depths.size() && behind >= depths[next] * n_text) {
      haystack.text += sentence(haystack.needles[next++]);
    }
    haystack.text += paragraph;
    behind += n;
  }
  while (next < depths.size()) haystack.text += sentence(haystack.needles[next++]);
  return haystack;
}

}  // namespace thimble
