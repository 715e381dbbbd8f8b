// The texts of `thimble eval`'s tasks: the same from the same seed, with every answer where it is said to be, and no
// longer than asked for.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <sstream>

#include "eval/haystack.h"
#include "eval/needle.h"
#include "eval/ruler.h"
#include "eval/shipped_text.h"
#include "eval/tool_calls.h"

namespace thimble {
namespace {

/// Tokens of a simple tokenizer: words of up to four letters, and all other characters but spaces.
int count_tokens(const std::string& text) {
  int n = 0, in_word = 0;
  for (const char c : text) {
    if (std::isalnum(static_cast<unsigned char>(c))) {
      n += in_word++ % 4 == 0;
    } else {
      in_word = 0;
      n += c != ' ';
    }
  }
  return n;
}

std::string text_at(const Sample& sample, Span span) {
  return sample.text.substr(span.begin, span.end - span.begin);
}

size_t occurrences(const std::string& text, const std::string& what) {
  size_t n = 0;
  for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) n++;
  return n;
}

int tokens_of(const Sample& sample) {
  return count_tokens(sample.text) + count_tokens(sample.questions.front().answered());
}

// --- needle and multikey ---

TEST(Haystack, HidesEveryKeyAtItsDepth) {
  const std::vector<double> depths = {0.0, 0.25, 0.5, 0.75, 1.0};
  const Sample hay =
      make_haystack(paragraphs_of("one two three\n\nfour five\n"), depths, 3000, /*seed=*/5, count_tokens);
  EXPECT_LE(count_tokens(hay.text), 3000);
  EXPECT_GE(count_tokens(hay.text), 2990);
  ASSERT_EQ(hay.questions.size(), depths.size());
  std::set<std::string> asked, numbers;
  for (size_t i = 0; i < depths.size(); i++) {
    const Question& question = hay.questions[i];
    const std::vector<std::string>& options = question.answer.at(0).options;
    asked.insert(question.text);
    numbers.insert(options.front());
    EXPECT_EQ(text_at(hay, question.evidence.at(0)), question.text + options.front() + ".\n");
    EXPECT_EQ(occurrences(hay.text, question.text), 1u) << "hidden once";
    EXPECT_NEAR(double(question.evidence[0].begin) / double(hay.text.size()), depths[i], 0.03);
    for (size_t place = 0; place < 7; place++) {
      std::set<char> digits;
      for (const std::string& number : options) digits.insert(number.at(place));
      EXPECT_EQ(digits.size(), 10u);
    }
  }
  EXPECT_EQ(asked.size(), depths.size());
  EXPECT_EQ(numbers.size(), depths.size());
  EXPECT_THROW(make_haystack(noise(), depths, 10, 1, count_tokens), std::runtime_error);
}

TEST(Haystack, SameSeedSameText) {
  const auto make = [](uint64_t seed) { return make_haystack(noise(), {0.1, 0.9}, 2000, seed, count_tokens).text; };
  EXPECT_EQ(make(1), make(1));
  EXPECT_NE(make(1), make(2));
}

// --- RULER ---

class Ruler : public testing::TestWithParam<std::string> {
protected:
  static Sample make(int n_tokens, uint64_t seed = 1) {
    return make_ruler(GetParam(), {paragraphs_of(shipped_text()), n_tokens, seed, count_tokens});
  }
};

TEST_P(Ruler, SameSeedSameText) {
  const Sample a = make(1500), b = make(1500), c = make(1500, 2);
  EXPECT_EQ(a.text, b.text);
  EXPECT_EQ(a.questions.at(0).answered(), b.questions.at(0).answered());
  EXPECT_NE(a.text, c.text);
  EXPECT_NE(a.questions.at(0).answered(), c.questions.at(0).answered());
}

TEST_P(Ruler, KeepsToTheNumberOfTokens) {
  for (const int n : {700, 1000, 4096, 16384}) {
    const Sample sample = make(n);
    EXPECT_LE(tokens_of(sample), n);
    EXPECT_GE(tokens_of(sample), n - std::max(100, n / 10)) << n;
  }
  EXPECT_THROW(make(40), std::runtime_error);
}

TEST_P(Ruler, OptionsAreDifferentAndTheRightOnesComeFirst) {
  for (uint64_t seed = 1; seed <= 5; seed++) {
    const Sample sample = make(1500, seed);
    for (const Choice& choice : sample.questions.at(0).answer) {
      EXPECT_EQ(std::set<std::string>(choice.options.begin(), choice.options.end()).size(), choice.options.size());
      EXPECT_GE(choice.n_right, 1);
      EXPECT_LT(size_t(choice.n_right), choice.options.size()) << "an answer can be wrong";
    }
  }
}

/// What the evidence must tell, read from the text and not from the generator.
TEST_P(Ruler, TheAnswerIsInTheTextWhereItIsSaidToBe) {
  const std::string task = GetParam();
  for (uint64_t seed = 1; seed <= 5; seed++) {
    const Sample sample = make(1500, seed);
    const Question& q = sample.questions.at(0);
    ASSERT_FALSE(q.evidence.empty());
    if (task.starts_with("niah")) {
      ASSERT_GE(q.evidence.size(), q.answer.size());
      for (size_t i = 0; i < q.answer.size(); i++) {
        const std::string needle = text_at(sample, q.evidence[i]), &right = q.answer[i].options.front();
        EXPECT_TRUE(needle.ends_with(" is: " + right + ".\n")) << needle;
        EXPECT_EQ(occurrences(sample.text, right), 1u);
        // The key of the needle is the one that is asked for.
        const std::string key = needle.substr(needle.find("for the "), needle.find(" is: ") - needle.find("for the "));
        EXPECT_NE((q.text + q.answer[i].before).find(key), std::string::npos) << key;
      }
    } else if (task == "vt") {
      // Follow the assignments: exactly the right names have the value.
      std::map<std::string, std::string> value;
      std::istringstream lines(sample.text);
      for (std::string line; std::getline(lines, line);) {
        if (!line.starts_with("VAR ")) continue;
        const std::string name = line.substr(4, 5), from = line.substr(12);
        value[name] = from.starts_with("VAR ") ? value.at(from.substr(4)) : from;
      }
      EXPECT_EQ(value.size(), 10u);
      const Choice& first = q.answer.at(0);
      for (size_t i = 0; i < first.options.size(); i++) {
        const bool right = q.text.find(" " + value.at(first.options[i]) + " ") != std::string::npos;
        EXPECT_EQ(right, int(i) < first.n_right) << first.options[i];
      }
      EXPECT_EQ(q.answer.size(), 5u);
    } else if (task == "cwe" || task == "fwe") {
      std::map<std::string, int> n;
      std::istringstream words(sample.text);
      for (std::string word; words >> word;) n[word]++;
      const Choice& first = q.answer.at(0);
      ASSERT_EQ(int(q.answer.size()), first.n_right);
      int least = 1 << 30, most = 0;
      for (int i = 0; i < first.n_right; i++) least = std::min(least, n[first.options[size_t(i)]]);
      for (size_t i = size_t(first.n_right); i < first.options.size(); i++) most = std::max(most, n[first.options[i]]);
      EXPECT_GT(least, most);
      EXPECT_GT(most, 0) << "wrong words are in the text";
      // No other word of the text is as frequent.
      for (const auto& [word, times] : n) {
        const bool is_right = std::find(first.options.begin(), first.options.begin() + first.n_right, word) !=
                              first.options.begin() + first.n_right;
        if (is_right || word.size() != 6 || word.find('.') != std::string::npos) continue;
        EXPECT_LT(times, least) << word;
      }
    } else {
      const std::string& right = q.answer.at(0).options.front();
      ASSERT_EQ(q.evidence.size(), task == "qa_1" ? 1u : 2u);
      EXPECT_EQ(occurrences(sample.text, right), 1u) << "nothing else is said of the town";
      std::string all;
      for (const Span& span : q.evidence) all += text_at(sample, span);
      EXPECT_NE(all.find("was born in " + right), std::string::npos) << all;
      const size_t end = all.find(" was born in "), line = all.rfind('\n', end) + 1;  // npos + 1 is 0
      const std::string name = all.substr(line, end - line);
      if (task == "qa_1") {
        EXPECT_NE(q.text.find("Where was " + name + " born?"), std::string::npos) << q.text;
      } else {
        EXPECT_EQ(q.text.find(name), std::string::npos) << "the owner must be looked up";
        EXPECT_NE(all.find("It belongs to " + name + "."), std::string::npos) << all;
        const size_t thing = all.find("The ") + 4;
        EXPECT_NE(q.text.find("owner of the " + all.substr(thing, all.find(" is made of") - thing) + " "),
                  std::string::npos)
            << q.text;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tasks, Ruler, testing::ValuesIn(ruler_tasks()), [](const auto& task) { return task.param; });

TEST(RulerTasks, AreThirteen) {
  EXPECT_EQ(ruler_tasks().size(), 13u);
  EXPECT_THROW(make_ruler("niah", {{"text"}, 1000, 1, count_tokens}), std::runtime_error);
}

// --- calls of tools ---

std::string render(const std::vector<Message>& messages) {
  std::string text;
  for (const Message& m : messages) text += "[" + m.role + "]\n" + m.content + "\n";
  return text + "[assistant]\n";
}

TEST(ToolCalls, SameSeedSameConversation) {
  const auto make = [](uint64_t seed) { return make_tool_call(2000, seed, count_tokens, render).sample.text; };
  EXPECT_EQ(make(1), make(1));
  EXPECT_NE(make(1), make(2));
}

TEST(ToolCalls, KeepToTheNumberOfTokens) {
  for (const int n : {800, 1024, 4096, 16384}) {
    const Sample sample = make_tool_call(n, 1, count_tokens, render).sample;
    EXPECT_LE(tokens_of(sample), n);
    EXPECT_GE(tokens_of(sample), n - std::max(150, n / 10)) << n;
  }
  EXPECT_THROW(make_tool_call(100, 1, count_tokens, render), std::runtime_error);
}

TEST(ToolCalls, DefinitionsAndResultsAreJsonAndTellTheCall) {
  for (uint64_t seed = 1; seed <= 10; seed++) {
    const ToolCall call = make_tool_call(2000, seed, count_tokens, render);
    const std::string& text = call.sample.text;
    const Question& q = call.sample.questions.at(0);

    // Its definition has the function and the names of its arguments.
    std::set<std::string> functions;
    bool is_defined = false;
    const size_t begin = text.find("<tools>\n") + 8;
    std::istringstream lines(text.substr(begin, text.find("</tools>") - begin));
    for (std::string line; std::getline(lines, line);) {
      const auto definition = nlohmann::json::parse(line);
      EXPECT_TRUE(functions.insert(definition["name"]).second) << line;
      if (definition["name"] != call.right["name"]) continue;
      is_defined = true;
      for (const auto& [name, value] : call.right["arguments"].items()) {
        EXPECT_TRUE(definition["parameters"]["properties"].contains(name)) << name;
      }
      EXPECT_EQ(definition["parameters"]["properties"].size(), call.right["arguments"].size());
    }
    EXPECT_TRUE(is_defined);
    for (const std::string& option : q.answer.at(0).options) EXPECT_TRUE(functions.count(option)) << option;

    // The result that is the evidence has the values, and the customer that the request names.
    const auto result = nlohmann::json::parse(text_at(call.sample, q.evidence.at(0)));
    for (const auto& [name, value] : call.right["arguments"].items()) EXPECT_EQ(result[name], value) << name;
    const size_t request = text.rfind("[user]");
    EXPECT_NE(text.find(result["customer"].get<std::string>(), request), std::string::npos);
    EXPECT_EQ(text.find(result["town"].get<std::string>(), request), std::string::npos) << "the request tells no value";

    // The question's answer is that call.
    const CallCheck check = check_call(q.answered() + "}}", call.right);
    EXPECT_TRUE(check.parses && check.names && check.right) << q.answered();
    Question wrong = q;
    std::swap(wrong.answer[2].options[0], wrong.answer[2].options[1]);
    EXPECT_FALSE(check_call(wrong.answered() + "}}", call.right).right);
  }
}

TEST(ToolCalls, ChecksWhatAModelWrote) {
  const nlohmann::json right = {{"name", "f"}, {"arguments", {{"a", "1"}, {"b", 2}}}};
  const auto check = [&](const char* text) {
    const CallCheck c = check_call(text, right);
    return std::string(c.parses ? "parses " : "") + (c.names ? "names " : "") + (c.right ? "right" : "");
  };
  EXPECT_EQ(check(R"(<tool_call>{"name": "f", "arguments": {"b": 2, "a": "1"}}</tool_call>)"), "parses names right");
  EXPECT_EQ(check(R"(Sure. {"name":"f","arguments":{"a":"1","b":3}} and more})"), "parses names ");
  EXPECT_EQ(check(R"({"name":"f","arguments":{"a":"1"}})"), "parses ");
  EXPECT_EQ(check(R"({"name":"g","arguments":{"a":"1","b":2}})"), "parses ");
  EXPECT_EQ(check(R"({"name":"f","arguments":[1]})"), "parses ");
  EXPECT_EQ(check(R"({"name":"f","arguments":{"a":"1","b":2)"), "");
  EXPECT_EQ(check(R"({"name" "f"})"), "");
  EXPECT_EQ(check("none"), "");
  EXPECT_EQ(first_object(R"(x {"a": "}\"{"} y)"), R"({"a": "}\"{"})");
}

}  // namespace
}  // namespace thimble
