// Keys hidden in long text, after RULER (arXiv 2404.06654): sentences that give a key a number, somewhere in a long
// text, and a question for one of the keys behind it. Generated from a seed.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace thimble {

struct Needle {
  std::string key;
  double depth = 0;  // of the text before it, 0 to 1
  /// Ten numbers of seven digits, of which the first is the key's. In each place all ten have different digits, so that
  /// guessing has a chance of a tenth there.
  std::vector<std::string> numbers;
};

struct Haystack {
  std::string text;
  std::vector<Needle> needles;
};

/// At most ten `depths`, in ascending order; the numbers of a haystack's needles are one another's distractors.
/// `paragraphs` are taken in order, over and over, as long as the text counts at most `n_tokens` by `count`. Throws
/// std::runtime_error where not even the needles fit.
Haystack make_haystack(const std::vector<std::string>& paragraphs, const std::vector<double>& depths, int n_tokens,
                       uint64_t seed, const std::function<int(const std::string&)>& count);

/// What stands behind the haystack; it goes on with the number.
std::string question(const Needle& needle);

/// A text's paragraphs, or, of an empty text, the sentences that RULER repeats.
std::vector<std::string> paragraphs_of(const std::string& text);

}  // namespace thimble
