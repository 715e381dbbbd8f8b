// Question answering over short documents about people, towns and things that are made up.
#include <algorithm>

#include "eval/generator.h"
#include "eval/haystack.h"
#include "eval/ruler.h"

namespace thimble {
namespace {

constexpr size_t kOptions = 10;

const std::vector<std::string> kTrades = {"baker",    "carpenter", "clerk",   "doctor", "farmer",  "fisher",
                                          "gardener", "judge",     "painter", "pilot",  "teacher", "weaver"};
const std::vector<std::string> kMaterials = {"brass", "clay", "copper", "glass", "iron", "oak", "silver", "stone"};

/// People, things and towns of one text. Person i owns thing i; the question is about person 0.
struct World {
  Generator random;
  std::vector<std::string> names, things, places;
  std::vector<std::string> born;  // options of the answer: the towns in which the first people were born

  explicit World(uint64_t seed)
      : random(seed), names(people(random)), things(key_names(random)), places(towns(random)) {
    born.assign(places.begin(), places.begin() + kOptions);
    places.erase(places.begin(), places.begin() + 1);  // nobody but person 0 has to do with the right one
  }

  std::string person(size_t i) {
    const std::string& name = names[i % names.size()];
    return name + " was born in " + (i < kOptions ? born[i] : random.one_of(places)) + ", lives in " +
           random.one_of(places) + " and works as a " + random.one_of(kTrades) + ".\n";
  }
  std::string thing(size_t i) {
    return "The " + key_name(things, i, random) + " is made of " + random.one_of(kMaterials) + ". It belongs to " +
           names[i % names.size()] + ".\n";
  }
};

Sample build(const RulerInput& input, int n_hops, int n_tokens) {
  World world(input.seed);
  std::vector<double> depths = {world.random.share(), world.random.share()};
  std::sort(depths.begin(), depths.end());
  std::vector<Hidden> hidden;
  if (n_hops == 1) {
    hidden.push_back({world.person(0), depths[0], {}});
  } else {
    // Either may come first.
    hidden.push_back({world.person(0), depths[0], {}});
    hidden.push_back({world.thing(0), depths[1], {}});
    if (world.random.below(2)) std::swap(hidden[0].text, hidden[1].text);
  }
  // A thing of people that are not asked for, and a person, in turn.
  const auto filler = [&](size_t i) { return i % 2 ? world.thing(1 + i / 2) : world.person(1 + i / 2); };
  Sample sample;
  sample.text = "The following documents tell of people, places and things.\n";
  const size_t intro = sample.text.size();
  sample.text += weave(filler, hidden, n_tokens - input.count(sample.text), input.count);
  Question question{n_hops == 1 ? "Where was " + world.names[0] + " born? " + world.names[0] + " was born in "
                                : "Where was the owner of the " + world.things[0] + " born? The owner of the " +
                                      world.things[0] + " was born in ",
                    {{"", world.born, 1, false, ""}},
                    {}};
  for (const Hidden& h : hidden) question.evidence.push_back({intro + h.at.begin, intro + h.at.end});
  question.depth = double(question.evidence.front().begin) / double(sample.text.size());
  sample.questions.push_back(std::move(question));
  return sample;
}

}  // namespace

Sample make_documents(const RulerInput& input, int n_hops) {
  return fit(input.n_tokens, input.count, [&](int n) { return build(input, n_hops, n); });
}

}  // namespace thimble
