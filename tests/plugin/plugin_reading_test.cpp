// A coded cache that llama.cpp reads by other ops than flash attention: the plugin decodes the rows that they read.
// With flash attention off, llama.cpp keeps values transposed, and so do its states.
#include <algorithm>

#include "support/plugin_session.h"
#include "support/temporary_folder.h"

namespace thimble::test {
namespace {

constexpr const char* kWarning = "rows of the KV cache that are decoded for every batch, which is slow";

Options without_flash(uint32_t n_seq = 1, bool unified = true) {
  Options options;
  options.coded_flash_attention = false;
  options.n_seq = n_seq;
  options.unified = unified;
  if (!unified) options.n_ctx *= n_seq;
  return options;
}

using PluginReading = PluginTest;

TEST_F(PluginReading, BatchesLikePlain) {
  expect_like_plain(without_flash(), [](Session& s) {
    int first = 0;
    for (int n : {70, 1, 1, 7, 64, 1}) {
      s.feed(text(first, n), 0, 8);
      first += n;
    }
  });
}

TEST_F(PluginReading, SeveralThreadsLikePlain) {
  Options options = without_flash();
  options.n_threads = 3;
  expect_like_plain(options, [](Session& s) {
    s.feed(text(0, 90), 0, 8);
    for (int i = 0; i < 3; i++) s.feed(text(90 + i, 1));
  });
}

TEST_F(PluginReading, SequencesLikePlain) {
  for (bool unified : {true, false}) {
    expect_like_plain(without_flash(4, unified), [](Session& s) {
      s.feed_together({{1, text(100, 40)}, {2, text(200, 50)}, {3, text(300, 45)}}, 2);
      for (int i = 0; i < 4; i++) s.feed_together({{2, text(250 + i, 1)}, {3, text(345 + i, 1)}});
      llama_memory_seq_cp(s.memory(), 2, 0, -1, -1);
      for (int i = 4; i < 8; i++) s.feed_together({{0, text(400 + i, 1)}, {2, text(250 + i, 1)}});
    });
  }
}

TEST_F(PluginReading, RemovalAndContextShiftLikePlain) {
  for (bool unified : {true, false}) {
    expect_like_plain(without_flash(2, unified), [](Session& s) {
      s.feed_together({{0, text(0, 60)}, {1, text(100, 80)}}, 1);
      llama_memory_seq_rm(s.memory(), 0, 50, -1);
      llama_memory_seq_rm(s.memory(), 1, 4, 24);
      llama_memory_seq_add(s.memory(), 1, 24, -1, -20);
      for (int i = 0; i < 4; i++) s.feed_together({{0, text(60 + i, 1)}, {1, text(180 + i, 1)}});
    });
  }
}

// The same cells leave the window as with flash attention, so the plugin has found the queries, and the masks of the
// sequences: at 2 bits it matters which.
TEST_F(PluginReading, KeepsTheWindowsOfFlashAttention) {
  for (bool unified : {true, false}) {
    std::vector<Logits> logits[3];
    for (int i = 0; i < 3; i++) {
      Options options = without_flash(2, unified).with_bits(2);
      options.coded_flash_attention = i == 0;
      if (i == 2) options.last = 12;
      Session session(options);
      session.feed_together({{0, text(0, 70)}, {1, text(300, 70)}}, 1);
      for (int k = 0; k < 30; k++) session.feed_together({{0, text(70 + k, 1)}, {1, text(370 + k, 1)}});
      logits[i] = session.logits;
    }
    const double nmse = compare(logits[0], logits[1]).nmse, narrower = compare(logits[0], logits[2]).nmse;
    std::printf("NMSE %.1e, with a narrower window %.1e\n", nmse, narrower);
    EXPECT_LT(nmse, 3e-4);  // a rounding now and then tips a code over
    EXPECT_GT(narrower, 10 * nmse);
  }
}

TEST_F(PluginReading, WithRetrievalAllRowsAreExact) {
  Options options = without_flash().with_bits(2);
  options.retrieval = "top=16";
  Session plain(options.with_bits(0)), coded(options);
  for (Session* s : {&plain, &coded}) {
    s->feed(text(0, 90), 0, 8);
    for (int i = 0; i < 3; i++) s->feed(text(90 + i, 1));
  }
  EXPECT_LT(compare(plain.logits, coded.logits).nmse, 1e-6);
}

TEST_F(PluginReading, TheUserIsToldOnce) {
  for (bool flash_attention : {false, true}) {
    Options options = without_flash().with_bits(4);
    options.coded_flash_attention = flash_attention;
    Session session(options);
    session.feed(text(0, 40));
    const std::string log = session.log() + take_log();
    const size_t first = log.find(kWarning);
    EXPECT_EQ(first != std::string::npos, !flash_attention) << log;
    EXPECT_EQ(log.find(kWarning, first + 1), std::string::npos) << "told twice";
    if (!flash_attention) {
      EXPECT_NE(log.find("--flash-attn on"), std::string::npos);
    }
  }
}

// ---- states

using Bytes = std::vector<uint8_t>;

Bytes save(Session& session, int sequence = 0) {
  Bytes state(llama_state_seq_get_size(session.context(), sequence));
  state.resize(llama_state_seq_get_data(session.context(), state.data(), state.size(), sequence));
  return state;
}

bool load(Session& session, const Bytes& state, int sequence = 0) {
  return llama_state_seq_set_data(session.context(), state.data(), state.size(), sequence) == state.size();
}

std::vector<Logits> go_on(Session& session, int sequence = 0) {
  session.logits.clear();
  for (int i = 0; i < 4; i++) session.feed(text(400 + i, 1), sequence);
  return session.logits;
}

class PluginReadingState : public PluginTest, public testing::WithParamInterface<double> {
protected:
  static Options options(uint32_t n_seq = 1, bool unified = true) {
    return without_flash(n_seq, unified).with_bits(GetParam());
  }
};

TEST_P(PluginReadingState, GoesOnBitForBit) {
  Session original(options()), restored(options());
  original.feed(text(0, 95), 0, 1);
  original.feed(text(95, 1));
  restored.feed(text(500, 40), 0, 1);  // is replaced
  expect_goes_on_bit_for_bit(
      original, restored, [](Session& s) { return save(s); },
      [](Session& s, const Bytes& state) { return load(s, state); }, [](Session& s) { return go_on(s); });
}

// Of cells that are not adjacent, llama.cpp reads and writes each number of each stretch by itself.
TEST_P(PluginReadingState, IntoOtherCells) {
  for (bool unified : {true, false}) {
    Session original(options(2, unified)), restored(options(2, unified)), back(options(2, unified));
    for (Session* s : {&original, &restored}) {
      for (int i = 0; i < 6; i++) {
        s->feed(text(10 * i, 10), 0, 1);
        s->feed(text(500 + 7 * i, 7), 1, 1);
      }
      s->feed(text(60, 1), 0);  // or cells would still wait for the next token to leave
    }
    llama_memory_seq_rm(restored.memory(), 0, -1, -1);  // leaves holes
    const Bytes state = save(original, 0);
    ASSERT_TRUE(load(restored, state, 0));
    EXPECT_TRUE(save(restored, 0) == state);
    ASSERT_TRUE(load(back, state, 1));
    EXPECT_LT(compare(go_on(original, 0), go_on(back, 1)).nmse, 1e-4) << (unified ? "unified" : "streams");
  }
}

TEST_P(PluginReadingState, OfPlainLlamaCppLoads) {
  Session plain(options().with_bits(0)), coded(options());
  plain.feed(text(0, 80), 0, 1);
  ASSERT_TRUE(load(coded, save(plain)));
  const double kl = compare(go_on(plain), go_on(coded)).mean_kl;
  EXPECT_LT(kl, GetParam() == 16 ? 1e-4 : 0.02);
}

INSTANTIATE_TEST_SUITE_P(, PluginReadingState, testing::Values(16.0, 4.0),
                         [](const auto& info) { return "Bits" + std::to_string(int(info.param)); });

TEST_F(PluginReading, AStateOfOtherSettingsIsRefused) {
  Session two(without_flash().with_bits(2)), four(without_flash().with_bits(4));
  two.feed(text(0, 80), 0, 1);
  const Bytes state = save(two);
  take_log();
  load(four, state);
  EXPECT_NE(take_log().find("saved with other cache settings"), std::string::npos);
  EXPECT_TRUE(save(four) == state);
  try {
    four.feed(text(80, 1));
    ADD_FAILURE() << "attended to refused cells";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("its cells hold a state of other cache settings"), std::string::npos);
  }
}

TEST_F(PluginReading, AFileOfOtherSettingsIsRefused) {
  const TemporaryFolder folder;
  const std::string path = folder.file("state");
  Session two(without_flash().with_bits(2)), four(without_flash().with_bits(4));
  const Tokens tokens = text(0, 90);
  two.feed(tokens, 0, 1);
  ASSERT_GT(llama_state_seq_save_file(two.context(), path.c_str(), 0, tokens.data(), tokens.size()), 0u);
  Tokens read(tokens.size());
  size_t n_read = 0;
  EXPECT_EQ(llama_state_seq_load_file(four.context(), path.c_str(), 0, read.data(), read.size(), &n_read), 0u);
  four.feed(text(0, 20), 0, 1);  // its cells are good again
}

}  // namespace
}  // namespace thimble::test
