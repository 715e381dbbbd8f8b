// A long text with sentences hidden in it at given depths, kept to a number of tokens.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "eval/sample.h"

namespace thimble {

/// A sentence to hide.
struct Hidden {
  std::string text;
  double depth = 0;  // the share of the text before it, 0 to 1
  Span at;           // where it went
};

/// Joins the texts of `filler(0)`, `filler(1)`, ... while all has at most `n_tokens` tokens, and hides each of
/// `hidden`, whose depths ascend, in front of the first text that has its depth. Sets their places. Throws
/// std::runtime_error where not even they fit.
std::string weave(const std::function<std::string(size_t)>& filler, std::vector<Hidden>& hidden, int n_tokens,
                  const TokenCount& count);

/// A filler that repeats paragraphs in order. Throws std::runtime_error where there are none.
std::function<std::string(size_t)> repeated(std::vector<std::string> paragraphs);

/// A text's paragraphs: its lines that are not blank.
std::vector<std::string> paragraphs_of(const std::string& text);

/// The sentences that RULER repeats as noise.
std::vector<std::string> noise();

/// Makes a sample that has at most `n_tokens` tokens together with the longest of its questions and its answer.
/// `make(n)` makes one of about n tokens in all, the same one for the same n.
Sample fit(int n_tokens, const TokenCount& count, const std::function<Sample(int)>& make);

}  // namespace thimble
