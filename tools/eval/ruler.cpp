#include "eval/ruler.h"

#include <functional>
#include <stdexcept>
#include <utility>

#include "eval/needle.h"

namespace thimble {
namespace {

using Maker = std::function<Sample(const RulerInput&)>;

Maker needles(const NeedleSpec& spec) {
  return [spec](const RulerInput& in) { return make_needles(spec, in.paragraphs, in.n_tokens, in.seed, in.count); };
}

const std::vector<std::pair<std::string, Maker>>& makers() {
  using Hay = NeedleSpec::Hay;
  static const std::vector<std::pair<std::string, Maker>> all = {
      {"niah_single_1", needles({.hay = Hay::noise})},
      {"niah_single_2", needles({})},
      {"niah_single_3", needles({.uuid_values = true})},
      {"niah_multikey_1", needles({.n_keys = 4})},
      {"niah_multikey_2", needles({.hay = Hay::needles})},
      {"niah_multikey_3", needles({.hay = Hay::needles, .uuid_keys = true, .uuid_values = true})},
      {"niah_multivalue", needles({.n_values = 4})},
      {"niah_multiquery", needles({.n_keys = 4, .n_queries = 4})},
      {"vt", make_variables},
      {"cwe", make_common_words},
      {"fwe", make_frequent_words},
      {"qa_1", [](const RulerInput& in) { return make_documents(in, 1); }},
      {"qa_2", [](const RulerInput& in) { return make_documents(in, 2); }}};
  return all;
}

}  // namespace

const std::vector<std::string>& ruler_tasks() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const auto& [name, maker] : makers()) all.push_back(name);
    return all;
  }();
  return names;
}

Sample make_ruler(const std::string& task, const RulerInput& input) {
  for (const auto& [name, maker] : makers()) {
    if (name == task) return maker(input);
  }
  throw std::runtime_error("RULER has no task called " + task);
}

}  // namespace thimble
