#include "eval/needle.h"

#include <algorithm>
#include <stdexcept>

#include "eval/generator.h"
#include "eval/haystack.h"

namespace thimble {
namespace {

constexpr size_t kNumbers = 10;  // options of an answer
constexpr int kDigits = 7;

std::string lead(const std::string& key, const char* kind = "number") {
  return std::string("The special magic ") + kind + " for the " + key + " is: ";
}

/// A number's own place in the list of options: the first, with the others behind it.
std::vector<std::string> options_of(std::vector<std::string> values, size_t right) {
  std::swap(values[0], values[right]);
  return values;
}

std::vector<double> random_depths(size_t n, Generator& random) {
  std::vector<double> depths;
  for (size_t i = 0; i < n; i++) depths.push_back(random.share());
  std::sort(depths.begin(), depths.end());
  return depths;
}

/// Keys and values of a RULER task. Needle i is the value i of key i / n_values for the key that is asked for; the keys
/// behind it have one value each.
struct Needles {
  std::vector<std::string> pairs, keys, values;  // values: the needles' first, then other options'

  Needles(const NeedleSpec& spec, Generator& random) : pairs(key_names(random)) {
    for (int i = 0; i < spec.n_keys; i++) keys.push_back(spec.uuid_keys ? random.uuid() : pairs[size_t(i)]);
    if (!spec.uuid_values) {
      values = random.ten_numbers(kDigits);
    } else {
      values = random.different(kNumbers, [&] { return random.uuid(); });
    }
  }
};

Question one_value(const Needles& needles, const char* kind, std::vector<Span> evidence) {
  return {lead(needles.keys[0], kind), {{"", needles.values, 1, true, ""}}, std::move(evidence)};
}

Question all_values(const Needles& needles, int n_values, std::vector<Span> evidence) {
  Question question{"All special magic numbers for the " + needles.keys[0] + " are: ", {}, std::move(evidence)};
  std::vector<std::string> left = needles.values;
  for (int i = 0; i < n_values; i++) {
    question.answer.push_back({i ? ", " : "", left, n_values - i, true, ""});
    left.erase(left.begin());
  }
  return question;
}

Question all_keys(const Needles& needles, int n_queries, std::vector<Span> evidence) {
  Question question{lead(needles.keys[0]), {}, std::move(evidence)};
  for (int i = 0; i < n_queries; i++) {
    question.answer.push_back(
        {i ? ".\n" + lead(needles.keys[size_t(i)]) : "", options_of(needles.values, size_t(i)), 1, true, ""});
  }
  return question;
}

Sample build(const NeedleSpec& spec, const std::vector<std::string>& paragraphs, int n_tokens, uint64_t seed,
             const TokenCount& count) {
  Generator random(seed);
  const Needles needles(spec, random);
  const char* kind = spec.uuid_values ? "uuid" : "number";
  // The values of the key that is asked for come in their order; other keys' needles lie anywhere.
  std::vector<size_t> order(size_t(spec.n_values + spec.n_keys - 1));
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  if (spec.n_values == 1) random.shuffle(order);
  const std::vector<double> depths = random_depths(order.size(), random);
  std::vector<Hidden> hidden;
  for (size_t i = 0; i < order.size(); i++) {
    const size_t n = order[i], key = n < size_t(spec.n_values) ? 0 : n - size_t(spec.n_values) + 1;
    hidden.push_back({lead(needles.keys[key], kind) + needles.values[n] + ".\n", depths[i], {}});
  }

  size_t n_distractors = 0;
  const auto distractor = [&](size_t i) {
    const std::string key =
        spec.uuid_keys ? random.uuid() : key_name(needles.pairs, needles.keys.size() + n_distractors, random);
    n_distractors++;
    std::string value = spec.uuid_values ? random.uuid() : random.number(kDigits);
    if (i + order.size() < kNumbers) value = needles.values[i + order.size()];  // the answer's options
    return lead(key, kind) + value + ".\n";
  };
  const bool is_needles = spec.hay == NeedleSpec::Hay::needles;
  const auto filler = is_needles ? std::function<std::string(size_t)>(distractor)
                                 : repeated(spec.hay == NeedleSpec::Hay::noise ? noise() : paragraphs);

  Sample sample;
  sample.text = std::string("Special magic ") + kind + "s are hidden in the following text. Remember them.\n";
  const size_t intro = sample.text.size();
  sample.text += weave(filler, hidden, n_tokens - count(sample.text), count);
  std::vector<Span> evidence(order.size());
  for (size_t i = 0; i < order.size(); i++) {
    evidence[order[i]] = {intro + hidden[i].at.begin, intro + hidden[i].at.end};
  }
  evidence.resize(size_t(std::max(spec.n_values, spec.n_queries)));
  Question question = spec.n_values > 1    ? all_values(needles, spec.n_values, evidence)
                      : spec.n_queries > 1 ? all_keys(needles, spec.n_queries, evidence)
                                           : one_value(needles, kind, evidence);
  question.depth = double(evidence.front().begin) / double(sample.text.size());
  sample.questions.push_back(std::move(question));
  return sample;
}

}  // namespace

Sample make_haystack(const std::vector<std::string>& paragraphs, const std::vector<double>& depths, int n_tokens,
                     uint64_t seed, const TokenCount& count) {
  if (depths.empty() || depths.size() > kNumbers) throw std::runtime_error("--depths takes one to ten depths");
  Generator random(seed);
  const std::vector<std::string> keys = key_names(random), numbers = random.ten_numbers(kDigits);
  std::vector<Hidden> hidden;
  for (size_t i = 0; i < depths.size(); i++) hidden.push_back({lead(keys[i]) + numbers[i] + ".\n", depths[i], {}});
  Sample sample;
  sample.text = weave(repeated(paragraphs), hidden, n_tokens, count);
  for (size_t i = 0; i < depths.size(); i++) {
    sample.questions.push_back({lead(keys[i]), {{"", options_of(numbers, i), 1, true, ""}}, {hidden[i].at}, depths[i]});
  }
  return sample;
}

Sample make_needles(const NeedleSpec& spec, const std::vector<std::string>& paragraphs, int n_tokens, uint64_t seed,
                    const TokenCount& count) {
  return fit(n_tokens, count, [&](int n) { return build(spec, paragraphs, n, seed, count); });
}

}  // namespace thimble
