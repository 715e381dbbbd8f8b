// An engine that refuses (plain_engine.cpp): the plugin gives its sentence each time, and the process goes on.
#include <cstdlib>

#include "support/plugin_session.h"

namespace thimble::test {
namespace {

using RefusingEngine = PluginTest;

void expect_context(const llama_context_params& params, bool made, const std::string& sentence) {
  take_log();
  const std::shared_ptr<llama_context> context(llama_init_from_model(load_model(true).get(), params), llama_free);
  const std::string log = take_log();
  EXPECT_EQ(context != nullptr, made) << log;
  EXPECT_NE(log.find(sentence), std::string::npos) << "not in the log: " << sentence << "\n" << log;
}

TEST_F(RefusingEngine, MakesNoContext) {
  const llama_context_params params = context_params(Options{}.with_bits(16));
  for (const char* what : {"settings", "layer", "write", "attend"}) {
    setenv("THIMBLE_TEST_REFUSES", what, 1);
    expect_context(params, false, std::string("the plain engine was told to refuse: ") + what);
  }
  unsetenv("THIMBLE_TEST_REFUSES");
  expect_context(params, true, "");
}

TEST_F(RefusingEngine, ServesOnlyWhatItCan) {
  load_model(true);
  expect_context(context_params(Options{}.with_bits(4)), false, "the plain engine keeps f16 rows: use bits=16");
}

TEST_F(RefusingEngine, AGraphThatFailsLeavesTheNextOneAlone) {
  Session session(Options{}.with_bits(16)), fresh(Options{}.with_bits(16));
  setenv("THIMBLE_TEST_REFUSES", "failure", 1);
  take_log();
  EXPECT_THROW(session.feed(text(0, 20), 0, 1), std::runtime_error);
  unsetenv("THIMBLE_TEST_REFUSES");
  llama_memory_clear(session.memory(), true);
  session.logits.clear();
  for (Session* each : {&session, &fresh}) each->feed(text(0, 20), 0, 1);
  EXPECT_TRUE(session.logits == fresh.logits);
}

}  // namespace
}  // namespace thimble::test
