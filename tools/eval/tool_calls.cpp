#include "eval/tool_calls.h"

#include <algorithm>
#include <stdexcept>

#include "eval/generator.h"
#include "eval/haystack.h"

namespace thimble {
namespace {

using json = nlohmann::ordered_json;

constexpr size_t kOptions = 10;
const char* const kVerbs[] = {"cancel", "ship", "return", "archive", "confirm", "delay", "refund", "pack"};
const char* const kThings[] = {"order",   "booking", "parcel",   "invoice", "ticket",   "contract",
                               "license", "sample",  "shipment", "voucher", "document", "machine"};

std::string call_text(const std::string& function, const json& arguments) {
  return "<tool_call>\n" + json{{"name", function}, {"arguments", arguments}}.dump() + "\n</tool_call>";
}

std::string definition(const std::string& function, const json& properties, const std::string& description) {
  const json parameters = {{"type", "object"}, {"properties", properties}};
  return json{{"name", function}, {"description", description}, {"parameters", parameters}}.dump() + "\n";
}

std::string find_definition(const std::string& thing) {
  return definition("find_" + thing, {{"customer", {{"type", "string"}}}}, "Finds the " + thing + " of a customer.");
}

std::string verb_definition(const std::string& verb, const std::string& thing) {
  std::string what = verb;
  what[0] = char(what[0] - 'a' + 'A');
  return definition(
      verb + "_" + thing,
      {{thing + "_id", {{"type", "string"}}}, {"town", {{"type", "string"}}}, {"price", {{"type", "integer"}}}},
      what + " the " + thing + ".");
}

/// What the results tell: of each customer the number, the town and the price of an order, say.
struct Records {
  std::vector<std::string> customers, ids, towns, prices;

  Records(size_t n, Generator& random) {
    customers = people(random);
    customers.resize(n);
    towns = thimble::towns(random);
    ids = random.ten_numbers(7);
    prices = random.ten_numbers(3);
    for (std::string& price : prices) {
      if (price[0] == '0') price[0] = '1';  // a number of JSON; this one shares a digit with another
    }
    for (size_t i = kOptions; i < n; i++) {
      ids.push_back(random.number(7));
      prices.push_back(std::to_string(100 + random.below(900)));
    }
  }
  json result(size_t i, const std::string& thing) const {
    return {{thing + "_id", ids[i]}, {"customer", customers[i]}, {"town", towns[i]}, {"price", std::stoi(prices[i])}};
  }
};

std::vector<std::string> first_options(const std::vector<std::string>& all) {
  return {all.begin(), all.begin() + std::ptrdiff_t(std::min(kOptions, all.size()))};
}

/// A conversation with so many definitions and results.
ToolCall build(size_t n_definitions, size_t n_results, uint64_t seed, const Render& render) {
  Generator random(seed);
  const std::string thing = kThings[random.below(std::size(kThings))];
  const std::string verb = kVerbs[random.below(std::size(kVerbs))];
  const Records records(std::max(n_results, kOptions), random);

  // The first two definitions are those that are used, the others are of the same thing first, so that a function's
  // name has others to be told apart from.
  std::vector<std::string> definitions = {find_definition(thing), verb_definition(verb, thing)};
  std::vector<std::string> functions = {verb + "_" + thing, "find_" + thing};  // the second is what was called before
  std::vector<std::pair<std::string, std::string>> others;
  for (const char* other_thing : kThings) {
    for (const char* other_verb : kVerbs) {
      if (other_thing != thing || other_verb != verb) others.emplace_back(other_verb, other_thing);
    }
  }
  random.shuffle(others);
  std::stable_partition(others.begin(), others.end(), [&](const auto& o) { return o.second == thing; });
  for (size_t i = 0; definitions.size() < n_definitions; i++) {
    auto [other_verb, other_thing] = others[i % others.size()];
    if (i >= others.size()) other_thing += "_" + random.word(3);  // a long list goes on with things of its own
    definitions.push_back(verb_definition(other_verb, other_thing));
    functions.push_back(other_verb);
    functions.back().append("_").append(other_thing);
  }
  random.shuffle(definitions);

  std::string system = "You call functions. These are their definitions:\n<tools>\n";
  for (const std::string& d : definitions) system += d;
  system += "</tools>\nCall one as <tool_call>{\"name\": ..., \"arguments\": {...}}</tool_call>.";
  std::vector<Message> messages = {{"system", system}};
  std::vector<size_t> order(n_results);
  for (size_t i = 0; i < n_results; i++) order[i] = i;
  random.shuffle(order);
  for (size_t i : order) {
    messages.push_back({"user", "Find the " + thing + " of " + records.customers[i] + "."});
    messages.push_back({"assistant", call_text("find_" + thing, {{"customer", records.customers[i]}})});
    messages.push_back({"user", "<tool_response>\n" + records.result(i, thing).dump() + "\n</tool_response>"});
    messages.push_back({"assistant", "Here it is."});
  }
  messages.push_back({"user", "Now " + verb + " the " + thing + " of " + records.customers[0] + "."});

  ToolCall out;
  out.right = {
      {"name", verb + "_" + thing},
      {"arguments",
       {{thing + "_id", records.ids[0]}, {"town", records.towns[0]}, {"price", std::stoi(records.prices[0])}}}};
  Question call;
  call.text = "<tool_call>\n{\"name\":\"";
  call.answer = {{"", first_options(functions), 1, false, "function"},
                 {"\",\"arguments\":{\"" + thing + "_id\":\"", first_options(records.ids), 1, true, "id"},
                 {"\",\"town\":\"", first_options(records.towns), 1, false, "town"},
                 {"\",\"price\":", first_options(records.prices), 1, true, "price"}};
  out.sample.text = render(messages);
  const std::string evidence = records.result(0, thing).dump();
  const size_t at = out.sample.text.find(evidence);
  if (at == std::string::npos) throw std::runtime_error("the chat template changes a message's text");
  call.evidence = {{at, at + evidence.size()}};
  call.depth = double(at) / double(out.sample.text.size());
  out.sample.questions = {call};
  return out;
}

}  // namespace

ToolCall make_tool_call(int n_tokens, uint64_t seed, const TokenCount& count, const Render& render) {
  const auto total = [&](size_t n_definitions, size_t n_results) {
    const Sample sample = build(n_definitions, n_results, seed, render).sample;
    return count(sample.text) + count(sample.questions.front().answered()) + 2;  // 2: what a model puts before a text
  };
  // The least conversation, then what another definition and another result take of what is left.
  constexpr size_t kLeastDefinitions = 3, kLeastResults = 2, kStep = 8;
  const int least = total(kLeastDefinitions, kLeastResults);
  if (least > n_tokens) {
    throw std::runtime_error("tools needs a context of " + std::to_string(least) +
                             " tokens: ask for it with --context");
  }
  const int of_definitions = total(kLeastDefinitions + kStep, kLeastResults) - least;
  const int of_results = total(kLeastDefinitions, kLeastResults + kStep) - least;
  const auto fitting = [&](int n, int of_step) { return size_t(std::max(0, n) * double(kStep) / of_step); };
  for (int left = n_tokens - least;;) {
    const size_t definitions = kLeastDefinitions + fitting(left / 2, of_definitions);
    const size_t results = kLeastResults + fitting(left - left / 2, of_results);
    const int over = total(definitions, results) - n_tokens;
    if (over <= 0) return build(definitions, results, seed, render);
    left -= std::max(over, 1);
  }
}

std::string first_object(const std::string& text) {
  const size_t begin = text.find('{');
  if (begin == std::string::npos) return {};
  int depth = 0;
  bool in_string = false;
  for (size_t i = begin; i < text.size(); i++) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') i++;
      in_string = c != '"';
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{') {
      depth++;
    } else if (c == '}' && --depth == 0) {
      return text.substr(begin, i + 1 - begin);
    }
  }
  return {};
}

CallCheck check_call(const std::string& text, const nlohmann::json& right) {
  CallCheck check;
  const nlohmann::json call = nlohmann::json::parse(first_object(text), nullptr, /*allow_exceptions=*/false);
  check.parses = call.is_object();
  if (!check.parses || !call.contains("arguments") || !call["arguments"].is_object()) return check;
  const auto names = [](const nlohmann::json& arguments) {
    std::vector<std::string> all;
    for (const auto& [name, value] : arguments.items()) all.push_back(name);
    return all;  // nlohmann::json sorts them
  };
  check.names =
      call.value("name", nlohmann::json()) == right["name"] && names(call["arguments"]) == names(right["arguments"]);
  check.right = check.names && call["arguments"] == right["arguments"];
  return check;
}

}  // namespace thimble
