// The operations of llama.cpp on a cache while it decodes; THIMBLE0 is held to the plain CPU.
#include "support/plugin_session.h"

namespace thimble::test {
namespace {

using PluginDecode = PluginTest;

Options sequences(uint32_t n, bool unified) {
  Options options;
  options.n_seq = n;
  options.unified = unified;
  if (!unified) options.n_ctx *= n;
  return options;
}

// ---- batches

void feed_batches(Session& session, const std::vector<int>& sizes) {
  int first = 0;
  for (int n : sizes) {
    session.feed(text(first, n), 0, 8);
    first += n;
  }
}

// As plain llama.cpp, in batches of these sizes.
void expect_batches_like_plain(const Options& options, const std::vector<int>& sizes) {
  expect_like_plain(options, [&](Session& s) { feed_batches(s, sizes); });
}

TEST_F(PluginDecode, BatchesLargerThanTheUbatch) {
  Options options;
  options.n_ubatch = 32;
  expect_batches_like_plain(options, {200, 1, 1, 7, 64, 1});
}

TEST_F(PluginDecode, BatchesSmallerThanTheUbatch) {
  Options options;
  options.n_ubatch = 512;
  expect_batches_like_plain(options, {64, 7, 1, 150, 9, 8, 2, 1, 1});
}

TEST_F(PluginDecode, FiveThreads) {
  Options options;
  options.n_threads = 5;
  expect_batches_like_plain(options, {70, 1, 3});
}

TEST_F(PluginDecode, TheSameThreadsGiveTheSameBits) {
  Options options;
  options.bits = 2;
  options.n_threads = 2;
  Session a(options), b(options);
  for (Session* s : {&a, &b}) feed_batches(*s, {70, 1, 3});
  EXPECT_TRUE(a.logits == b.logits);
}

TEST_F(PluginDecode, WithoutMmap) {
  Options options;
  options.mmap = false;
  expect_batches_like_plain(options, {70, 1, 3});
}

// ---- sequences

void feed_four(Session& session) {
  session.feed_together({{0, text(0, 60)}, {1, text(100, 40)}, {2, text(200, 50)}, {3, text(300, 45)}}, 2);
  for (int i = 0; i < 6; i++) {
    session.feed_together({{0, text(60 + i, 1)}, {1, text(140 + i, 1)}, {2, text(250 + i, 1)}, {3, text(345 + i, 1)}});
  }
}

TEST_F(PluginDecode, FourSequencesOfAUnifiedCache) {
  expect_like_plain(sequences(4, true), feed_four);
}

TEST_F(PluginDecode, FourSequencesOfAStreamEach) {
  expect_like_plain(sequences(4, false), feed_four);
}

TEST_F(PluginDecode, SomeOfTheStreams) {
  expect_like_plain(sequences(4, false), [](Session& s) {
    s.feed(text(100, 60), 2, 1);
    s.feed(text(0, 50), 3, 1);
    for (int i = 0; i < 4; i++) s.feed_together({{2, text(160 + i, 1)}, {3, text(50 + i, 1)}});
    for (int i = 4; i < 8; i++) s.feed(text(50 + i, 1), 3);
  });
}

void copy_and_go_on(Session& session) {
  session.feed(text(0, 90), 0, 1);
  llama_memory_seq_cp(session.memory(), 0, 1, -1, -1);
  session.feed_together({{0, text(90, 12)}, {1, text(300, 12)}}, 4);
  for (int i = 0; i < 4; i++) session.feed_together({{0, text(102 + i, 1)}, {1, text(312 + i, 1)}});
}

TEST_F(PluginDecode, CopyOfASequenceInAUnifiedCache) {
  expect_like_plain(sequences(2, true), copy_and_go_on);
}

TEST_F(PluginDecode, CopyOfASequenceToAnotherStream) {
  expect_like_plain(sequences(2, false), copy_and_go_on);
}

// ---- removal, shift, clear

TEST_F(PluginDecode, RemovalAtTheEndAndReuseOfItsCells) {
  expect_like_plain({}, [](Session& s) {
    s.feed(text(0, 120), 0, 1);
    llama_memory_seq_rm(s.memory(), 0, 50, -1);  // of coded cells as well as of the window
    s.feed(text(200, 30), 0, 8);
    for (int i = 0; i < 4; i++) s.feed(text(230 + i, 1));
  });
}

TEST_F(PluginDecode, RemovalInTheMiddleAndReuseOfItsCells) {
  expect_like_plain({}, [](Session& s) {
    s.feed(text(0, 120), 0, 1);
    llama_memory_seq_rm(s.memory(), 0, 30, 70);
    s.feed(text(200, 60), 0, 8);
    for (int i = 0; i < 4; i++) s.feed(text(260 + i, 1));
  });
}

TEST_F(PluginDecode, CellsOfARemovedSequence) {
  expect_like_plain(sequences(2, true), [](Session& s) {
    s.feed_together({{0, text(0, 60)}, {1, text(100, 60)}}, 1);
    llama_memory_seq_rm(s.memory(), 0, -1, -1);
    s.feed(text(200, 80), 0, 4);
    for (int i = 0; i < 4; i++) s.feed_together({{0, text(280 + i, 1)}, {1, text(160 + i, 1)}});
  });
}

TEST_F(PluginDecode, ContextShift) {
  expect_like_plain({}, [](Session& s) {
    s.feed(text(0, 120), 0, 1);
    for (int round = 0; round < 2; round++) {
      llama_memory_seq_rm(s.memory(), 0, 4, 34);
      llama_memory_seq_add(s.memory(), 0, 34, -1, -30);
      s.feed(text(120 + 20 * round, 20), 0, 8);
    }
    for (int i = 0; i < 4; i++) s.feed(text(160 + i, 1));
  });
}

TEST_F(PluginDecode, ContextShiftOfOneStream) {
  expect_like_plain(sequences(2, false), [](Session& s) {
    s.feed_together({{0, text(0, 60)}, {1, text(100, 80)}}, 1);
    llama_memory_seq_rm(s.memory(), 1, 4, 24);
    llama_memory_seq_add(s.memory(), 1, 24, -1, -20);
    for (int i = 0; i < 4; i++) s.feed_together({{0, text(60 + i, 1)}, {1, text(180 + i, 1)}});
  });
}

TEST_F(PluginDecode, ClearedCacheIsAsNew) {
  for (double bits : rates({16, 4, 2})) {
    Session used(Options{}.with_bits(bits)), fresh(Options{}.with_bits(bits));
    used.feed(text(300, 100));
    llama_memory_clear(used.memory(), true);
    used.logits.clear();
    for (Session* s : {&used, &fresh}) feed_batches(*s, {50, 3, 1, 1});
    EXPECT_TRUE(used.logits == fresh.logits) << bits << " bits";
  }
}

// ---- the exact window

// Four sequences one after the other in batches of four tokens, and the third of them alone.
void feed_in_step(Session& session, bool only_third) {
  const int first[] = {0, 150, 300, 450};
  for (int i = 0; i < 40; i++) {
    if (only_third) {
      session.feed(text(first[2] + i, 1), 2);
      continue;
    }
    const size_t before = session.logits.size();
    session.feed_together({{0, text(first[0] + i, 1)},
                           {1, text(first[1] + i, 1)},
                           {2, text(first[2] + i, 1)},
                           {3, text(first[3] + i, 1)}});
    session.logits = {session.logits.begin(), session.logits.begin() + before + 3};
    session.logits.erase(session.logits.begin() + before, session.logits.begin() + before + 2);
  }
}

// At 2 bits the window matters much: with fewer cells in it the logits are far off, as they would be for a sequence
// that lost its own last cells to others.
TEST_F(PluginDecode, EachSequenceKeepsItsOwnWindow) {
  for (bool unified : {false, true}) {
    Options options = sequences(4, unified), narrow_options = options;
    options.bits = narrow_options.bits = 2;
    narrow_options.last = 12;
    Session together(options), alone(options), narrow(narrow_options);
    feed_in_step(together, false);
    feed_in_step(alone, true);
    feed_in_step(narrow, true);
    const double nmse = compare(alone.logits, together.logits).nmse;
    const double nmse_if_narrow = compare(alone.logits, narrow.logits).nmse;
    EXPECT_LT(nmse, 5e-5) << (unified ? "unified" : "streams");  // a rounding now and then tips a code over
    EXPECT_GT(nmse_if_narrow, 20 * nmse) << (unified ? "unified" : "streams");
    std::printf("%s: NMSE %.1e, with a narrower window %.1e\n", unified ? "unified" : "streams", nmse, nmse_if_narrow);
  }
}

// ---- several tokens at once, as speculative decoding asks for them

// A prompt of 150 tokens, then 96 more in batches of `n` of which `wrong` at the end are drafts that are taken back.
std::vector<Logits> decode_drafts(const Options& options, int n, int wrong) {
  Session session(options);
  session.feed(text(0, 150), 0, 0);
  session.logits.clear();
  std::vector<Logits> accepted;
  for (int at = 150; at < 246;) {
    const int right = std::min(n - wrong, 246 - at);
    Tokens tokens = text(at, right);
    const Tokens drafts = text(500 + at, wrong);
    tokens.insert(tokens.end(), drafts.begin(), drafts.end());
    session.logits.clear();
    session.feed(tokens);
    accepted.insert(accepted.end(), session.logits.begin(), session.logits.begin() + right);
    at += right;
    llama_memory_seq_rm(session.memory(), 0, at, -1);
  }
  return accepted;
}

// What is left is the rounding of sums, which now and then tips a code over or has another cell retrieved.
TEST_F(PluginDecode, SeveralTokensAtOnceSeeWhatEachWouldHaveSeenAlone) {
  Options f16, bits4, bits2, retrieves;
  f16.plain_flash_attention = true;
  bits4.bits = 4;
  bits2.bits = retrieves.bits = 2;
  retrieves.retrieval = "top=64";
  for (Options* options : {&f16, &bits4, &bits2, &retrieves}) {
    options->last = 128;
    options->pool = 40;
    const std::string name = options->coded() ? options->kv() : "f16";
    const std::vector<Logits> alone = decode_drafts(*options, 1, 0);
    for (const auto& [n, wrong] : {std::pair{4, 3}, {9, 0}, {16, 9}}) {
      const Difference difference = compare(alone, decode_drafts(*options, n, wrong));
      std::printf("%s, %d tokens, %d taken back: KL mean %.1e, max %.1e\n", name.c_str(), n, wrong, difference.mean_kl,
                  difference.max_kl);
      EXPECT_LT(difference.mean_kl, 1e-5) << name << ", " << n << " tokens, " << wrong << " taken back";
    }
  }
}

}  // namespace
}  // namespace thimble::test
