// The tasks of `thimble eval` on a small real model: what is scored comes from the cells of the text. A cache that lost
// them scores at chance.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>

#include "eval/haystack.h"
#include "eval/needle.h"
#include "eval/ruler.h"
#include "eval/session.h"
#include "eval/shipped_text.h"
#include "eval/tool_calls.h"

namespace thimble {
namespace {

class EvalSession : public testing::Test {
protected:
  static constexpr int kContext = 512;

  static void SetUpTestSuite() {
    const char* model = std::getenv("THIMBLE_TEST_MODEL");
    if (!model) return;
    start_llama();
    SessionOptions options;
    options.model = model;
    options.context.n_cells = kContext;
    options.context.n_sequences = 1;
    session_ = std::make_unique<Session>(options, parse_cache("f16"), read_layout(model, options.context));
  }
  static void TearDownTestSuite() { session_.reset(); }
  void SetUp() override {
    if (!session_) GTEST_SKIP() << "no model";
  }

  /// Positions of the tokens that have a span of a text.
  static std::pair<int, int> positions(const std::string& text, Span span) {
    const auto before = [&](size_t n) { return int(tokenize(session_->model(), text.substr(0, n)).size()); };
    return {before(span.begin), before(span.end)};
  }

  static std::unique_ptr<Session> session_;
};

std::unique_ptr<Session> EvalSession::session_;

TEST_F(EvalSession, ACacheThatForgetsTheNeedlesCellsScoresAtChance) {
  const Sample hay = make_haystack(paragraphs_of(shipped_text()), {0.2, 0.5, 0.8}, kContext - 100, /*seed=*/1,
                                   session_->token_count());
  const int n = session_->read(hay.text);
  AnswerScore kept, forgotten;
  for (const Question& question : hay.questions) {
    kept.add(session_->answer(question, n));
    session_->rewind(n);
  }
  for (const Question& question : hay.questions) {
    const auto [begin, end] = positions(hay.text, question.evidence.at(0));
    ASSERT_GT(end, begin + 10);
    session_->forget(begin, end);
  }
  for (const Question& question : hay.questions) {
    forgotten.add(session_->answer(question, n));
    session_->rewind(n);
  }
  const double chance = kept.chance / kept.n;
  EXPECT_NEAR(chance, 0.1, 1e-9);
  EXPECT_GT(kept.score / kept.n, 0.5);
  EXPECT_NEAR(forgotten.score / forgotten.n, chance, 0.08);
  EXPECT_EQ(forgotten.found, 0);
}

TEST_F(EvalSession, WithoutTheTextEveryTaskScoresAtChance) {
  double score = 0, chance = 0;
  const auto& tasks = ruler_tasks();
  for (const std::string& task : tasks) {
    const Sample sample = make_ruler(task, {paragraphs_of(shipped_text()), 1000, /*seed=*/3, session_->token_count()});
    session_->clear();
    const AnswerScore answer = session_->answer(sample.questions.at(0), 0);
    printf("%-16s score %.3f chance %.3f\n", task.c_str(), answer.score, answer.chance);
    EXPECT_NEAR(answer.score, answer.chance, 0.25) << task;
    EXPECT_EQ(answer.found, 0) << task;
    score += answer.score / double(tasks.size());
    chance += answer.chance / double(tasks.size());
  }
  EXPECT_NEAR(score, chance, 0.06);
}

TEST_F(EvalSession, WithoutTheConversationACallScoresAtChance) {
  const auto render = [](const std::vector<Message>& messages) {
    std::string text;
    for (const Message& m : messages) text += m.role + ": " + m.content + "\n";
    return text;
  };
  double score = 0, chance = 0;
  constexpr int kCalls = 3;
  for (int seed = 1; seed <= kCalls; seed++) {
    const ToolCall call = make_tool_call(1000, uint64_t(seed), session_->token_count(true), render);
    session_->clear();
    const AnswerScore answer = session_->answer(call.sample.questions.at(0), 0);
    // The function's name may be guessed; the values that the results tell may not.
    for (size_t i = 1; i < answer.by_choice.size(); i++) score += answer.by_choice[i] / 3 / kCalls;
    chance += answer.chance / kCalls;
  }
  EXPECT_NEAR(score, chance, 0.1);
}

}  // namespace
}  // namespace thimble
