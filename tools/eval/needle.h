// Keys hidden in long text, after RULER (arXiv 2404.06654): a long text has sentences that give a key a number, and
// ends with a question for one of the keys. Generated from a seed.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace thimble {

struct Needle {
  std::string key;
  double depth = 0;  // the share of the text before the needle, 0 to 1
  /// Ten numbers of seven digits, of which the first is the key's. In each place all ten have different digits, so that
  /// guessing has a chance of a tenth there.
  std::vector<std::string> numbers;
};

struct Haystack {
  std::string text;
  std::vector<Needle> needles;
};

/// Hides a needle at each of at most ten `depths`, which ascend; the numbers of a haystack's needles are one another's
/// distractors. `paragraphs` are repeated in order while the text has at most `n_tokens` tokens, as `count` counts
/// them. Throws std::runtime_error where not even the needles fit.
Haystack make_haystack(const std::vector<std::string>& paragraphs, const std::vector<double>& depths, int n_tokens,
                       uint64_t seed, const std::function<int(const std::string&)>& count);

/// The question behind the haystack; the number is what it goes on with.
std::string question(const Needle& needle);

/// A text's paragraphs; for an empty text, the sentences that RULER repeats.
std::vector<std::string> paragraphs_of(const std::string& text);

}  // namespace thimble
