// Several contexts in one process, and contexts that cannot be made.
#include <cmath>
#include <cstdlib>
#include <thread>

#include "support/plugin_session.h"

namespace thimble::test {
namespace {

using PluginContexts = PluginTest;
using PluginRefuses = PluginTest;

void tell(Session& session, int first) {
  session.feed(text(first, 70), 0, 4);
  for (int i = 0; i < 6; i++) session.feed(text(first + 70 + i, 1));
}

std::vector<Logits> told_alone(const Options& options, int first) {
  Session session(options);
  tell(session, first);
  return session.logits;
}

// ---- side by side

TEST_F(PluginContexts, OfOtherSettingsInOneProcess) {
  const Options two = Options{}.with_bits(2), four = Options{}.with_bits(4), pass = Options{}.with_bits(16);
  Session a(two), b(four), c(pass);
  int first = 0;
  const std::vector<int> batches = {30, 1, 1, 1, 1, 1, 1, 1, 1, 4};
  for (int n : batches) {
    for (Session* s : {&a, &b, &c}) s->feed(text(first, n));
    first += n;
  }
  for (auto [session, options] : {std::pair{&a, two}, {&b, four}, {&c, pass}}) {
    Session alone(options);
    first = 0;
    for (int n : batches) alone.feed(text(first, n)), first += n;
    EXPECT_TRUE(session->logits == alone.logits) << options.kv();
  }
}

// As speculative decoding does it: another model on the device, whose cache tensors have the same names.
TEST_F(PluginContexts, OfTwoModelsInTurns) {
  Options target = Options{}.with_bits(4), draft = target;
  draft.mmap = false;  // loads the model another time
  draft.n_ctx = 512;
  ASSERT_NE(load_model(true, true), load_model(true, false));
  Session a(target), b(draft);
  for (int round = 0; round < 8; round++) {
    for (int i = 0; i < 4; i++) b.feed(text(100 + 4 * round + i, 1));
    a.feed(text(4 * round, 4));
    llama_memory_seq_rm(a.memory(), 0, 4 * round + 3, -1);  // the last guess was wrong
    a.feed(text(4 * round + 3, 1));
  }
  Session a_alone(target), b_alone(draft);
  for (int i = 0; i < 32; i++) b_alone.feed(text(100 + i, 1));
  for (int round = 0; round < 8; round++) {
    a_alone.feed(text(4 * round, 4));
    llama_memory_seq_rm(a_alone.memory(), 0, 4 * round + 3, -1);
    a_alone.feed(text(4 * round + 3, 1));
  }
  EXPECT_TRUE(a.logits == a_alone.logits);
  EXPECT_TRUE(b.logits == b_alone.logits);
}

TEST_F(PluginContexts, DecodeFromTwoThreadsAtOnce) {
  Options options = Options{}.with_bits(2);
  const auto first_alone = told_alone(options, 0), second_alone = told_alone(options, 300);
  Session first(options), second(options);
  text(0, 1);  // read before the threads start
  std::thread other([&] { tell(second, 300); });
  tell(first, 0);
  other.join();
  EXPECT_TRUE(first.logits == first_alone);
  EXPECT_TRUE(second.logits == second_alone);
}

TEST_F(PluginContexts, ThreadsChangeBetweenBatches) {
  Session session(Options{}.with_bits(4)), plain(Options{});
  for (Session* s : {&session, &plain}) {
    int first = 0;
    for (int n_threads : {1, 3, 2}) {
      llama_set_n_threads(s->context(), n_threads, n_threads);
      for (int n : {12, 1, 1}) s->feed(text(first, n)), first += n;
    }
  }
  EXPECT_LT(compare(plain.logits, session.logits).mean_kl, 0.02);
}

TEST_F(PluginContexts, WithoutAWindow) {
  Options options;
  options.last = options.pool = 0;
  expect_like_plain(
      options, [](Session& s) { tell(s, 0); }, 0.05);
}

TEST_F(PluginContexts, ANewContextFindsNothingOfAnOldOne) {
  const Options options = Options{}.with_bits(2);
  const auto before = told_alone(options, 0);
  told_alone(options, 300);
  EXPECT_TRUE(told_alone(options, 0) == before);
}

// What the log says of a cache of `n_ctx` cells for `n_seq` sequences with a stream each.
std::string told_of_cache(const char* settings, uint32_t n_ctx, uint32_t n_seq) {
  Options options = Options{}.with_bits(2);
  options.n_seq = n_seq;
  options.unified = false;
  options.n_ctx = n_ctx;
  const llama_context_params params = context_params(options);
  setenv("THIMBLE_KV", settings, 1);
  take_log();
  const std::shared_ptr<llama_context> context(llama_init_from_model(load_model(true).get(), params), llama_free);
  return context ? take_log() : "no context";
}

TEST_F(PluginContexts, SaysWhatStaysF16) {
  const std::string small = told_of_cache("bits=2", 1024, 1);
  EXPECT_NE(small.find("THIMBLE0 KV buffer size =    22.50 MiB"), std::string::npos) << small;
  EXPECT_NE(
      small.find("thimble: KV cache not coded: 30 layers stay f16, 22.50 MiB: caches of at most small=1024 cells"),
      std::string::npos)
      << small;
  // Four streams of 1024 cells are coded, eight of 256 stay f16.
  EXPECT_NE(told_of_cache("bits=2", 4096, 4).find("thimble: KV cache of 30 layers: "), std::string::npos);
  EXPECT_NE(told_of_cache("bits=4", 2048, 8).find("of 256 cells a stream so many are exact"), std::string::npos);
  EXPECT_NE(told_of_cache("bits=4,small=0", 2048, 8).find("thimble: KV cache of 30 layers: "), std::string::npos);
}

TEST_F(PluginContexts, SaysWhatAMissingProfileCosts) {
  EXPECT_NE(told_of_cache("bits=2", 2048, 1).find("no profile"), std::string::npos);
  EXPECT_EQ(told_of_cache("bits=4", 2048, 1).find("no profile"), std::string::npos);
}

// A cache on another device is not refused, but a warning names it.
TEST_F(PluginContexts, CachesLeftElsewhereAreNamed) {
  llama_context_params params = context_params(Options{}.with_bits(4));
  for (bool offload : {true, false}) {
    params.offload_kqv = offload;
    take_log();
    const std::shared_ptr<llama_context> context(llama_init_from_model(load_model(true).get(), params), llama_free);
    ASSERT_NE(context, nullptr);
    EXPECT_EQ(take_log().find("is not on THIMBLE0 and so not coded") != std::string::npos, !offload);
    Tokens tokens = text(0, 8);
    EXPECT_EQ(llama_decode(context.get(), llama_batch_get_one(tokens.data(), int(tokens.size()))), 0);
  }
}

TEST_F(PluginContexts, EmbeddingsAsPlain) {
  std::vector<Logits> embeddings;
  for (double bits : {0.0, 16.0}) {
    llama_context_params params = context_params(Options{}.with_bits(bits));
    params.embeddings = true;
    params.pooling_type = LLAMA_POOLING_TYPE_MEAN;
    const auto model = load_model(bits != 0);
    const std::shared_ptr<llama_context> context(llama_init_from_model(model.get(), params), llama_free);
    ASSERT_NE(context, nullptr);
    Tokens tokens = text(0, 50);
    ASSERT_EQ(llama_decode(context.get(), llama_batch_get_one(tokens.data(), int(tokens.size()))), 0);
    const float* data = llama_get_embeddings_seq(context.get(), 0);
    ASSERT_NE(data, nullptr);
    embeddings.push_back({data, data + llama_model_n_embd(model.get())});
  }
  double error = 0, power = 0;
  for (size_t i = 0; i < embeddings[0].size(); i++) {
    error += std::pow(embeddings[0][i] - embeddings[1][i], 2);
    power += std::pow(embeddings[0][i], 2);
  }
  EXPECT_LT(error / power, 1e-6);
}

// ---- other cache types are names for the cache that the settings ask for

Options of_type(ggml_type type, double bits) {
  Options options;
  options.coded_type = type;
  options.bits = bits;
  return options;
}

void shift_and_reload(Session& session) {
  session.feed(text(0, 120), 0, 8);
  llama_memory_seq_rm(session.memory(), 0, 4, 34);
  llama_memory_seq_add(session.memory(), 0, 34, -1, -30);
  for (int i = 0; i < 4; i++) session.feed(text(120 + i, 1));
  std::vector<uint8_t> state(llama_state_seq_get_size(session.context(), 0));
  state.resize(llama_state_seq_get_data(session.context(), state.data(), state.size(), 0));
  llama_memory_seq_rm(session.memory(), 0, -1, -1);
  ASSERT_EQ(llama_state_seq_set_data(session.context(), state.data(), state.size(), 0), state.size());
  for (int i = 0; i < 4; i++) session.feed(text(130 + i, 1));
}

class PluginCacheTypes : public PluginContexts, public testing::WithParamInterface<ggml_type> {};

INSTANTIATE_TEST_SUITE_P(, PluginCacheTypes, testing::Values(GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_F32),
                         [](const auto& info) { return std::string(ggml_type_name(info.param)); });

TEST_P(PluginCacheTypes, AreCodedAsAsked) {
  Session plain(Options{});
  ASSERT_NO_FATAL_FAILURE(shift_and_reload(plain));
  for (double bits : rates({16, 4})) {
    double kl_of_f16 = 0;
    for (ggml_type type : {GGML_TYPE_F16, GetParam()}) {
      Session session(of_type(type, bits));
      ASSERT_NO_FATAL_FAILURE(shift_and_reload(session));
      const Difference difference = compare(plain.logits, session.logits);
      std::printf("%g bits, %s: NMSE %.1e, KL %.1e\n", bits, ggml_type_name(type), difference.nmse, difference.mean_kl);
      const bool told =
          session.log().find(std::string("cache type ") + ggml_type_name(type) + " means bits=") != std::string::npos;
      EXPECT_EQ(told, type != GGML_TYPE_F16) << session.log();
      EXPECT_NE(session.log().find("thimble: KV cache of 30 layers"), std::string::npos);
      if (type == GGML_TYPE_F16) kl_of_f16 = difference.mean_kl;
      if (bits == 16) {
        EXPECT_LT(difference.nmse, 1e-5) << "q8_0 itself would be off by more";
      } else {
        EXPECT_LT(difference.mean_kl, 1.5 * kl_of_f16 + 1e-3) << "coded as well as with f16";
        EXPECT_GT(difference.mean_kl, 1e-4) << "nothing was read from codes";
      }
    }
  }
}

TEST_F(PluginContexts, OfAnotherCacheTypeThatIsNotCodedKeepsIt) {
  Options options = of_type(GGML_TYPE_Q8_0, 4), plain;
  options.small_cells = 4096;
  Session session(options), exact(plain);
  EXPECT_NE(session.log().find("cells (or q8_0, as llama.cpp was told to keep them)"), std::string::npos)
      << session.log();
  for (Session* s : {&session, &exact}) s->feed(text(0, 60), 0, 4);
  const double nmse = compare(exact.logits, session.logits).nmse;
  EXPECT_LT(nmse, 1e-3);
  EXPECT_GT(nmse, 1e-6) << "not of type q8_0";
}

// A profile's transforms are of the model's own keys and values, and llama.cpp rotates those of quantized types.
TEST_F(PluginContexts, OfAnotherCacheTypeKeepsItsProfile) {
  std::vector<Logits> plain;
  double kl[2];
  for (int i = 0; i < 3; i++) {
    Options options = of_type(i == 2 ? GGML_TYPE_Q8_0 : GGML_TYPE_F16, i == 0 ? 0 : 2);
    options.retrieval = "profile=" THIMBLE_TEST_DATA "/../../profiles/SmolLM2-135M-Instruct.Q4_1.thimble.gguf";
    Session session(options);
    session.feed(text(0, 200), 0, 64);
    for (int k = 0; k < 4; k++) session.feed(text(200 + k, 1));
    if (i == 0) plain = session.logits;
    if (i > 0) kl[i - 1] = compare(plain, session.logits).mean_kl;
  }
  std::printf("2 bits with a profile: KL %.2e with f16, %.2e with q8_0\n", kl[0], kl[1]);
  EXPECT_LT(kl[1], 1.2 * kl[0]);
}

// ---- refused, with a sentence

void expect_refused(const llama_context_params& params, const std::string& sentence) {
  take_log();
  const std::shared_ptr<llama_context> context(llama_init_from_model(load_model(true).get(), params), llama_free);
  const std::string log = take_log();
  EXPECT_EQ(context, nullptr) << sentence;
  EXPECT_NE(log.find(sentence), std::string::npos) << "not in the log: " << sentence << "\n" << log;
}

TEST_F(PluginRefuses, WrongSettings) {
  load_model(true);  // the plugin itself would refuse to load with such settings
  const llama_context_params params = context_params(Options{}.with_bits(4));
  for (const auto& [text, named] : {std::pair{"bits=5", "bits=5 is not one of"},
                                    {"bit=4", "unknown key 'bit'"},
                                    {"bits=4,,small=0", "'' is not of the form key=value"},
                                    {"garbage", "'garbage' is not of the form key=value"}}) {
    setenv("THIMBLE_KV", text, 1);
    expect_refused(params, named);
  }
}

TEST_F(PluginRefuses, AProfileThatIsNotThere) {
  load_model(true);
  const llama_context_params params = context_params(Options{}.with_bits(4));
  setenv("THIMBLE_KV", "bits=4,small=0,profile=/no/such/file.thimble.gguf", 1);
  expect_refused(params, "/no/such/file.thimble.gguf");
}

// After all refusals the process makes and runs contexts as before.
TEST_F(PluginRefuses, AndGoesOn) {
  const auto before = told_alone(Options{}.with_bits(4), 0);
  const llama_context_params params = context_params(Options{}.with_bits(4));
  setenv("THIMBLE_KV", "bits=4,small=0,profile=/no/such/file.thimble.gguf", 1);
  for (int i = 0; i < 3; i++) EXPECT_EQ(llama_init_from_model(load_model(true).get(), params), nullptr);
  EXPECT_TRUE(told_alone(Options{}.with_bits(4), 0) == before);
}

}  // namespace
}  // namespace thimble::test
