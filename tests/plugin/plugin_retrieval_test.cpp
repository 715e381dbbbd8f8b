// Retrieval in a program on libllama: logits nearer to f16's than with codes alone, exact prefill, exact states.
#include "support/plugin_session.h"
#include "support/temporary_folder.h"

namespace thimble::test {
namespace {

Options with(const std::string& retrieval, double bits = 2) {
  Options options;
  options.bits = bits;
  options.retrieval = bits == 16 ? "" : retrieval;
  return options;
}

// Logits of a scenario.
std::vector<Logits> run(const Options& options, const Scenario& scenario) {
  Session session(options);
  scenario(session);
  return session.logits;
}

void decode_some(Session& s) {
  s.feed(text(0, 300), 0, 1);
  s.logits.clear();
  for (int i = 0; i < 12; i++) s.feed(text(300 + i, 1));
}

using PluginRetrieval = PluginTest;

TEST_F(PluginRetrieval, IsCloserToF16ThanCodesAlone) {
  const auto exact = run(with("", 16), decode_some);
  const double codes = compare(exact, run(with(""), decode_some)).mean_kl;
  double last = codes;
  for (const auto& [retrieval, share] :
       {std::pair{"top=16", 0.7}, {"top=64", 0.4}, {"top=64,tail=drop", 0.9}, {"top=1000", 0.01}}) {
    const double kl = compare(exact, run(with(retrieval), decode_some)).mean_kl;
    std::printf("%s: mean KL %.5f, codes alone %.5f\n", retrieval, kl, codes);
    EXPECT_LT(kl, share * codes) << retrieval;
    last = kl;
  }
  EXPECT_LT(last, 1e-4) << "with all cells retrieved";
}

TEST_F(PluginRetrieval, PrefillIsExact) {
  // Three batches, too large to retrieve.
  const auto prefill = [](Session& session) { session.feed(text(0, 192), 0, 60); };
  EXPECT_LT(compare(run(with("", 16), prefill), run(with("top=16"), prefill)).nmse, 1e-6);
}

TEST_F(PluginRetrieval, AFileIsLikeRam) {
  const TemporaryFolder folder;
  const auto file = run(with("top=32,store=file,path=" + folder.path()), [&](Session& s) {
    decode_some(s);
    EXPECT_TRUE(folder.empty());
  });
  EXPECT_TRUE(file == run(with("top=32"), decode_some));
}

TEST_F(PluginRetrieval, ThreadsAndPolicyChangeNothingOrEverything) {
  Options threads = with("top=32");
  threads.n_threads = 2;
  // Sums of another order may choose another of two cells that are all but equal (measured: 2.9e-5).
  EXPECT_LT(compare(run(with("top=32"), decode_some), run(threads, decode_some)).nmse, 1e-4);
  EXPECT_TRUE(run(with("top=32,policy=none"), decode_some) == run(with(""), decode_some));
}

// Exact rows are copied and rotated with their cells.
TEST_F(PluginRetrieval, AfterAContextShift) {
  const auto shift = [](Session& s) {
    s.feed(text(0, 300), 0, 1);
    llama_memory_seq_rm(s.memory(), 0, 10, 110);
    llama_memory_seq_add(s.memory(), 0, 110, -1, -100);
    s.logits.clear();
    for (int i = 0; i < 16; i++) s.feed(text(300 + i, 1));
  };
  const auto exact = run(with("", 16), shift);
  EXPECT_LT(compare(exact, run(with("top=1000"), shift)).mean_kl, 1e-3);
  EXPECT_LT(compare(exact, run(with("top=64"), shift)).mean_kl, 0.4 * compare(exact, run(with(""), shift)).mean_kl);
}

TEST_F(PluginRetrieval, StatesAreExact) {
  const auto save = [](Session& s) {
    std::vector<uint8_t> state(llama_state_seq_get_size(s.context(), 0));
    state.resize(llama_state_seq_get_data(s.context(), state.data(), state.size(), 0));
    return state;
  };
  const auto load = [](Session& s, const std::vector<uint8_t>& state) {
    return llama_state_seq_set_data(s.context(), state.data(), state.size(), 0) == state.size();
  };
  for (const char* retrieval : {"top=64", "top=64,tail=drop"}) {
    SCOPED_TRACE(retrieval);
    Session original(with(retrieval)), restored(with(retrieval)), exact(with("", 16));
    original.feed(text(0, 400), 0, 1);
    const auto state = save(original);
    ASSERT_TRUE(load(restored, state));
    EXPECT_TRUE(save(restored) == state);
    ASSERT_TRUE(load(exact, state)) << "as f16";
    EXPECT_TRUE(save(exact) == state);
    for (Session* s : {&original, &restored, &exact}) {
      s->logits.clear();
      for (int i = 0; i < 8; i++) s->feed(text(400 + i, 1));
    }
    EXPECT_TRUE(restored.logits == original.logits);
  }
}

TEST_F(PluginRetrieval, AStoreThatCannotBeMadeMakesNoContext) {
  for (const auto& [store, why] : {std::pair{"store=file,path=/nowhere/at/all", "exact store in /nowhere/at/all"},
                                   {"store=pinned", "store=pinned is for CUDA devices"}}) {
    try {
      Session session(with(std::string("top=64,") + store));
      FAIL() << "made";
    } catch (const std::runtime_error& error) {
      EXPECT_NE(std::string(error.what()).find(why), std::string::npos) << error.what();
    }
  }
}

}  // namespace
}  // namespace thimble::test
