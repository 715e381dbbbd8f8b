// The thirteen tasks of RULER (arXiv 2404.06654, "RULER: What's the Real Context Size of Your Long-Context Language
// Models?"), at any length, from a seed, with texts of our own and answers that are scored by probability:
//
//   niah_single_1      a number, hidden in a sentence that is repeated
//   niah_single_2      a number in a text
//   niah_single_3      a UUID in a text
//   niah_multikey_1    a number among those of four keys, in a text
//   niah_multikey_2    a number in a text of nothing but such keys
//   niah_multikey_3    the same with UUIDs for keys and values
//   niah_multivalue    the four numbers of one key, in a text
//   niah_multiquery    the numbers of four keys, in a text
//   vt                 variables that have a value by way of one another, in a sentence that is repeated
//   cwe                the ten words that are common in a list
//   fwe                the three words that are the most frequent in a coded text
//   qa_1               a fact that one of many short documents states
//   qa_2               a fact that takes two of them
//
// They differ from RULER's in these points. Documents are about people, places and things that are made up, instead of
// SQuAD's and HotpotQA's. Words that are counted are made up, so that no model prefers one. Variable tracking has a
// second chain, whose variables are the wrong answers. Prompts have no examples and no chat template.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "eval/sample.h"

namespace thimble {

struct RulerInput {
  std::vector<std::string> paragraphs;  // the text in which tasks hide their needles
  int n_tokens = 0;                     // of text, question and answer
  uint64_t seed = 1;
  TokenCount count;
};

/// The names above, in that order.
const std::vector<std::string>& ruler_tasks();
/// A text with one question. Throws std::runtime_error where there is no such task, or too little room for it.
Sample make_ruler(const std::string& task, const RulerInput& input);

Sample make_variables(const RulerInput& input);
Sample make_common_words(const RulerInput& input);
Sample make_frequent_words(const RulerInput& input);
/// `n_hops`: documents that the answer takes, 1 or 2.
Sample make_documents(const RulerInput& input, int n_hops);

}  // namespace thimble
