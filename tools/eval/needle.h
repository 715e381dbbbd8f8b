// Keys hidden in long text, after RULER (arXiv 2404.06654): a long text has sentences that give a key a value, and ends
// with a question for some of the keys. Generated from a seed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "eval/sample.h"

namespace thimble {

/// Hides a needle at each of at most ten `depths`, which ascend, in `paragraphs`, repeated to at most `n_tokens`
/// tokens, and asks for each. Values are ten numbers that differ in every digit: the needles' and, where there are
/// fewer, others that the text does not have. Throws std::runtime_error where not even the needles fit.
Sample make_haystack(const std::vector<std::string>& paragraphs, const std::vector<double>& depths, int n_tokens,
                     uint64_t seed, const TokenCount& count);

/// RULER's needle tasks.
struct NeedleSpec {
  enum class Hay { noise, text, needles };  // what the needles are hidden in: `needles` are other keys' sentences
  Hay hay = Hay::text;
  bool uuid_keys = false, uuid_values = false;  // instead of words and numbers
  int n_keys = 1;                               // keys that are hidden
  int n_values = 1;                             // values of the key that is asked for
  int n_queries = 1;                            // keys that one question asks for
};

/// One question behind a text of at most `n_tokens` tokens, question and answer included, with needles at random
/// depths. `paragraphs`: the text, for Hay::text.
Sample make_needles(const NeedleSpec& spec, const std::vector<std::string>& paragraphs, int n_tokens, uint64_t seed,
                    const TokenCount& count);

}  // namespace thimble
