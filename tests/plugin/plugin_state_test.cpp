// States of a coded cache: a state that is saved, loaded elsewhere and saved again has the same bytes, and decoding
// goes on with the same logits.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <tuple>

#include "support/plugin_session.h"
#include "support/temporary_folder.h"
#include "support/tiny_model.h"

namespace thimble::test {
namespace {

using Bytes = std::vector<uint8_t>;

Bytes save(Session& session) {
  Bytes state(llama_state_get_size(session.context()));
  state.resize(llama_state_get_data(session.context(), state.data(), state.size()));
  return state;
}

bool load(Session& session, const Bytes& state) {
  return llama_state_set_data(session.context(), state.data(), state.size()) == state.size();
}

Bytes save(Session& session, int sequence) {
  Bytes state(llama_state_seq_get_size(session.context(), sequence));
  state.resize(llama_state_seq_get_data(session.context(), state.data(), state.size(), sequence));
  return state;
}

size_t load(Session& session, const Bytes& state, int sequence) {
  return llama_state_seq_set_data(session.context(), state.data(), state.size(), sequence);
}

// Logits of a few more tokens: one by one, then a few together.
std::vector<Logits> go_on(Session& session, int sequence = 0, const std::vector<int>& batches = {1, 1, 1, 5}) {
  session.logits.clear();
  int first = 400;
  for (int n : batches) {
    session.feed(text(first, n), sequence);
    first += n;
  }
  return session.logits;
}

class PluginState : public PluginTest, public testing::WithParamInterface<double> {
protected:
  Options options(uint32_t n_seq = 1, bool unified = true) {
    Options options;
    options.bits = GetParam();
    options.n_seq = n_seq;
    options.unified = unified;
    options.n_ctx *= unified ? 1 : n_seq;
    return options;
  }
};

TEST_P(PluginState, WholeStateGoesOnBitForBit) {
  Session original(options()), restored(options());
  original.feed(text(0, 90), 0, 1);
  for (int i = 0; i < 5; i++) original.feed(text(90 + i, 1));
  restored.feed(text(500, 40), 0, 1);  // is replaced
  expect_goes_on_bit_for_bit(
      original, restored, [](Session& s) { return save(s); },
      [](Session& s, const Bytes& state) { return load(s, state); }, [](Session& s) { return go_on(s); });
}

// After removal and reuse a sequence's cells are not in the order of its positions. (All that were removed are in use
// again: else the state is loaded into other cells.) A state lists cells by their numbers, so where those written last
// do not have the greatest, which cells leave next cannot be known: that is close, not equal.
TEST_P(PluginState, OfReusedCellsGoesOnBitForBit) {
  for (const auto& [first_removed, last_removed, n_more] : {std::tuple{20, 50, 40}, {80, 95, 15}, {90, 96, 9}}) {
    Session original(options()), restored(options());
    original.feed(text(0, 100), 0, 1);
    llama_memory_seq_rm(original.memory(), 0, first_removed, last_removed);
    for (int i = 0; i < n_more; i += 5) original.feed(text(200 + i, std::min(5, n_more - i)), 0, 1);
    original.feed(text(300, 1));  // or what the last five made too many would still wait for the next token to leave

    const Bytes state = save(original);
    ASSERT_TRUE(load(restored, state));
    EXPECT_TRUE(save(restored) == state);
    const std::vector<int> batches = {1, 1, 1, 5, 5, 5, 5};  // what the window holds now leaves it
    const std::vector<Logits> expected = go_on(original, 0, batches), after = go_on(restored, 0, batches);
    if (first_removed == 80) {
      EXPECT_LT(compare(expected, after).mean_kl, 0.01);
      EXPECT_TRUE(std::equal(expected.begin(), expected.begin() + 1, after.begin()));  // nothing has left yet
    } else {
      EXPECT_TRUE(after == expected) << first_removed;
    }
  }
}

// After a batch of several tokens, cells wait for the next batch to leave, by queries that a state does not hold.
TEST_P(PluginState, WhileCellsWaitToLeaveIsClose) {
  Session original(options()), restored(options());
  original.feed(text(0, 100), 0, 1);
  for (int i = 0; i < 4; i++) original.feed(text(100 + 5 * i, 5), 0, 1);
  ASSERT_TRUE(load(restored, save(original)));
  EXPECT_LT(compare(go_on(original), go_on(restored)).mean_kl, 0.05);
}

TEST_P(PluginState, OfASequenceIntoOtherCells) {
  for (bool unified : {true, false}) {
    Session original(options(2, unified)), restored(options(2, unified)), back(options(2, unified));
    original.feed(text(0, 90), 0, 1);
    restored.feed(text(500, 37), 0, 1);  // occupies the first cells

    const Bytes state = save(original, 0);
    ASSERT_EQ(load(restored, state, 1), state.size());
    const Bytes from_there = save(restored, 1);  // names sequence 1, so it is no copy of the first
    ASSERT_EQ(load(back, from_there, 0), from_there.size());
    EXPECT_TRUE(save(back, 0) == state) << (unified ? "unified" : "streams");
    // Other cells are other blocks, hence sums in another order.
    EXPECT_LT(compare(go_on(original, 0), go_on(restored, 1)).nmse, 1e-4) << (unified ? "unified" : "streams");
  }
}

TEST_P(PluginState, OfASequenceIntoItsOwnContext) {
  Session session(options(2, false)), undisturbed(options(2, false));
  for (Session* s : {&session, &undisturbed}) s->feed_together({{0, text(0, 90)}, {1, text(300, 50)}}, 1);
  const Bytes state = save(session, 0);
  llama_memory_seq_rm(session.memory(), 0, -1, -1);
  session.feed(text(500, 70), 0, 1);
  llama_memory_seq_rm(session.memory(), 0, -1, -1);
  ASSERT_EQ(load(session, state, 0), state.size());
  EXPECT_TRUE(save(session, 0) == state);
  EXPECT_TRUE(go_on(session, 0) == go_on(undisturbed, 0));
  EXPECT_TRUE(go_on(session, 1) == go_on(undisturbed, 1));
}

TEST_P(PluginState, ThroughAFile) {
  const TemporaryFolder folder;
  const std::string path = folder.file("state");
  Session original(options()), restored(options());
  const Tokens tokens = text(0, 80);
  original.feed(tokens, 0, 1);
  ASSERT_TRUE(llama_state_save_file(original.context(), path.c_str(), tokens.data(), tokens.size()));
  Tokens read(100);
  size_t n_read = 0;
  EXPECT_TRUE(llama_state_load_file(restored.context(), path.c_str(), read.data(), read.size(), &n_read));
  read.resize(n_read);
  EXPECT_EQ(read, tokens);
  EXPECT_TRUE(go_on(restored) == go_on(original));
}

TEST_P(PluginState, OfPlainLlamaCppLoads) {
  Options plain_options = options().with_bits(0);
  plain_options.plain_flash_attention = true;  // without it, llama.cpp transposes the values, and only loads them so
  Session plain(plain_options), coded(options());
  plain.feed(text(0, 80), 0, 1);
  const Bytes state = save(plain, 0);
  ASSERT_EQ(load(coded, state, 0), state.size());
  const double kl = compare(go_on(plain), go_on(coded)).mean_kl;
  EXPECT_LT(kl, GetParam() == 16 ? 1e-4 : GetParam() == 4 ? 0.02 : 1.0);
}

// Of layers with sliding windows llama.cpp saves what the next token sees. These cells come to other places, of blocks
// whose weights vector kernels round together: the scalar kernels alone (THIMBLE_ISA=scalar) tell the choice of exact
// cells, which must be the same, from that.
TEST_P(PluginState, OfWindowLayersGoesOn) {
  const char* isa = std::getenv("THIMBLE_ISA");
  const bool is_scalar = isa && std::string(isa) == "scalar";
  Options of_windows = options();
  of_windows.model = std::make_shared<TinyModel>(gemma4_like());
  const auto tokens = [](int first, int n) {
    Tokens all(n);
    for (int i = 0; i < n; i++) all[i] = (first + i) * (first + i + 3) % kTinyVocabulary;
    return all;
  };
  for (int n : {100, 300, 350, 600}) {  // from about 256 tokens on, the windows' cells are used again
    Session original(of_windows), restored(of_windows);
    for (int i = 0; i < n; i += 50) original.feed(tokens(i, 50), 0, 1);
    for (int i = 0; i < 5; i++) original.feed(tokens(n + i, 1));
    const Bytes state = save(original, 0);
    ASSERT_EQ(load(restored, state, 0), state.size());
    for (Session* s : {&original, &restored}) {
      s->logits.clear();
      for (int i = 0; i < 40; i++) s->feed(tokens(700 + i, 1));
    }
    const Difference difference = compare(original.logits, restored.logits);
    std::printf("%d tokens: NMSE %.1e, mean KL %.1e\n", n, difference.nmse, difference.mean_kl);
    EXPECT_LT(difference.nmse, is_scalar ? 1e-6 : 5e-3) << n;
  }
}

INSTANTIATE_TEST_SUITE_P(, PluginState, testing::Values(16.0, 4.0, 2.0),
                         [](const auto& info) { return "Bits" + std::to_string(int(info.param)); });

using PluginStateRefused = PluginTest;

// The log where the next token of a sequence cannot be decoded.
std::string error_of(Session& session, int sequence = 0) {
  try {
    session.feed(text(80, 1), sequence);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

// llama.cpp does not ask whether a row may be loaded, so the refusal is a line in the log, and a decode that fails as
// long as it would see such cells.
TEST_F(PluginStateRefused, WithOtherSettings) {
  for (const auto& [bits, unified] : {std::pair{4, true}, {4, false}, {16, true}}) {
    Options options;
    options.n_seq = 2;
    options.unified = unified;
    Session two(options.with_bits(2)), session(options.with_bits(bits));
    two.feed(text(0, 80), 0, 1);
    const Bytes state = save(two, 0);
    take_log();
    load(session, state, 0);
    EXPECT_NE(take_log().find("saved with other cache settings"), std::string::npos);
    EXPECT_NE(error_of(session).find("its cells hold a state of other cache settings"), std::string::npos);
    EXPECT_EQ(error_of(session, 1), "") << "a sequence that does not see the state";

    EXPECT_TRUE(save(session, 0) == state);
    llama_memory_seq_rm(session.memory(), 1, -1, -1);
    llama_memory_seq_cp(session.memory(), 0, 1, -1, -1);
    EXPECT_NE(error_of(session, 1), "");

    llama_memory_clear(session.memory(), true);
    Session fresh(session.options());
    EXPECT_TRUE(go_on(session) == go_on(fresh));
  }
}

// A file is refused when it is read: the sequence is empty then, and others go on.
TEST_F(PluginStateRefused, AFileOfOtherSettings) {
  Options options;
  options.n_seq = 2;
  const TemporaryFolder folder;
  const std::string path = folder.file("state");
  Session two(options.with_bits(2)), four(options.with_bits(4)), alone(options.with_bits(4));
  const Tokens tokens = text(0, 90);
  two.feed(tokens, 0, 1);
  ASSERT_GT(llama_state_seq_save_file(two.context(), path.c_str(), 0, tokens.data(), tokens.size()), 0u);
  for (Session* each : {&four, &alone}) each->feed(text(100, 40), 1, 1);
  Tokens read(tokens.size());
  size_t n_read = 0;
  take_log();
  EXPECT_EQ(llama_state_seq_load_file(four.context(), path.c_str(), 0, read.data(), read.size(), &n_read), 0u);
  EXPECT_NE(take_log().find("this state was saved with other cache settings"), std::string::npos);
  EXPECT_EQ(llama_memory_seq_pos_max(four.memory(), 0), -1);
  EXPECT_TRUE(go_on(four, 1) == go_on(alone, 1));
  four.feed(text(0, 20), 0, 1);  // its cells are good again
}

TEST_F(PluginStateRefused, CellsAreGoodAgainOnceWritten) {
  Session two(Options{}.with_bits(2)), four(Options{}.with_bits(4)), fresh(Options{}.with_bits(4));
  two.feed(text(0, 80), 0, 1);
  load(four, save(two), 0);
  llama_memory_seq_rm(four.memory(), 0, -1, -1);
  for (Session* s : {&four, &fresh}) s->feed(text(300, 100), 0, 4);
  EXPECT_TRUE(four.logits == fresh.logits);
}

TEST_F(PluginStateRefused, CutShort) {
  Session session(Options{}.with_bits(4)), other(Options{}.with_bits(4));
  session.feed(text(0, 80), 0, 1);
  Bytes state = save(session, 0);
  state.resize(state.size() / 2);
  EXPECT_EQ(load(other, state, 0), 0u);
}

}  // namespace
}  // namespace thimble::test
