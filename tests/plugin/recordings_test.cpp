// Tokens' graphs that are recorded and done again, on the emulated CUDA engine beside a backend that can be recorded:
// whole, with a part of the layers on each of two devices, and in pieces where tensors are split over these. Logits are
// those of the same graphs given anew, bit for bit.
#include "support/plugin_session.h"

namespace thimble::test {
namespace {

struct Places {
  std::string name;
  std::vector<std::string> recorded, given;  // devices of the plugin
  llama_split_mode split = LLAMA_SPLIT_MODE_LAYER;
  int recordings = 1;  // of a token's graph
};
void PrintTo(const Places& p, std::ostream* out) {
  *out << p.name;
}

constexpr int kLayers = 2;

Options on(const Places& places, const std::vector<std::string>& devices) {
  Options options;
  options.bits = 4;
  options.last = 4;
  options.pool = 2;
  options.n_ctx = 256;
  options.model = std::make_shared<TinyModel>(TinyModel{"llama", {{"block_count", uint32_t(kLayers)}}});
  options.devices = devices;
  options.split = places.split;
  return options;
}

// Token i of some.
Tokens token(int i) {
  return {llama_token(1 + i * 37 % (kTinyVocabulary - 1))};
}
Tokens tokens(int first, int n) {
  Tokens all;
  for (int i = 0; i < n; i++) all.push_back(token(first + i).front());
  return all;
}

int count(const std::string& log, const std::string& what) {
  int n = 0;
  for (size_t at = log.find(what); at != std::string::npos; at = log.find(what, at + 1)) n++;
  return n;
}

class Recordings : public PluginTest, public testing::WithParamInterface<Places> {
protected:
  void SetUp() override {
    if (!std::getenv("THIMBLE_TEST_RECORDING")) GTEST_SKIP() << "no backend that can be recorded";
  }
  // Leads a session on each of the two kinds of devices through the scenario. Returns how many graphs were recorded.
  static int expect_same(const Options& recorded, const Options& given, const Scenario& scenario) {
    Session a(recorded), b(given);
    // These devices have queues and events as ggml-cuda has, so llama.cpp lets two of them work at a prompt at once.
    const bool is_pipeline = recorded.devices.size() == 2 && recorded.split == LLAMA_SPLIT_MODE_LAYER;
    EXPECT_EQ(count(a.log(), "pipeline parallelism enabled"), is_pipeline);
    take_log();
    scenario(a);
    const std::string log = take_log();
    scenario(b);
    EXPECT_EQ(count(take_log(), "is recorded now"), 0);
    EXPECT_EQ(count(log, "could not be recorded"), 0) << log;
    EXPECT_FALSE(a.logits.empty());
    EXPECT_TRUE(a.logits == b.logits);
    return count(log, "is recorded now");
  }
};

INSTANTIATE_TEST_SUITE_P(
    , Recordings,
    testing::Values(
        Places{"OneDevice", {"THIMBLE0"}, {"THIMBLE2"}},
        Places{"Layers", {"THIMBLE0", "THIMBLE1"}, {"THIMBLE2", "THIMBLE3"}, LLAMA_SPLIT_MODE_LAYER, 2},
        Places{"Tensors", {"THIMBLE0", "THIMBLE1"}, {"THIMBLE2", "THIMBLE3"}, LLAMA_SPLIT_MODE_TENSOR, 2 * kLayers}),
    [](const auto& info) { return info.param.name; });

// Cells leave the window and are coded, 17 at a time, in tokens that are recorded and in others.
TEST_P(Recordings, AnAnswer) {
  const int n = expect_same(on(GetParam(), GetParam().recorded), on(GetParam(), GetParam().given), [](Session& s) {
    s.feed(tokens(0, 40), 0, 1);
    for (int i = 40; i < 80; i++) s.feed(token(i));
  });
  EXPECT_EQ(n, GetParam().recordings);
}

// Recordings of one kind of batch go on after others, after the end of the context was removed and after a shift.
TEST_P(Recordings, BatchesOfOtherSizesBetween) {
  const int n = expect_same(on(GetParam(), GetParam().recorded), on(GetParam(), GetParam().given), [](Session& s) {
    s.feed(tokens(0, 40), 0, 1);
    int at = 40;
    const auto one_by_one = [&](int n) {
      for (; n > 0; n--, at++) s.feed(token(at));
    };
    one_by_one(5);
    for (int i = 0; i < 4; i++, at += 3) s.feed(tokens(at, 3));
    one_by_one(4);
    llama_memory_seq_rm(s.memory(), 0, 45, -1);
    one_by_one(18);
    s.feed(tokens(at, 20), 0, 1);
    one_by_one(6);
    if (!llama_memory_can_shift(s.memory())) return;
    llama_memory_seq_rm(s.memory(), 0, 10, 30);
    llama_memory_seq_add(s.memory(), 0, 30, -1, -20);
    one_by_one(6);
  });
  EXPECT_GE(n, 2 * GetParam().recordings);  // of one token, and of three
}

TEST_P(Recordings, TwoSequences) {
  Options recorded = on(GetParam(), GetParam().recorded), given = on(GetParam(), GetParam().given);
  for (Options* options : {&recorded, &given}) {
    options->n_seq = 2;
    options->unified = false;
    options->n_ctx *= 2;
  }
  const int n = expect_same(recorded, given, [](Session& s) {
    s.feed(tokens(0, 30), 0, 1);
    s.feed(tokens(200, 20), 1, 1);
    for (int i = 0; i < 20; i++) s.feed_together({{0, token(30 + i)}, {1, token(220 + i)}});
    for (int i = 0; i < 5; i++) s.feed(token(50 + i), 0);
    for (int i = 0; i < 5; i++) s.feed_together({{0, token(55 + i)}, {1, token(240 + i)}});
  });
  EXPECT_GE(n, 2 * GetParam().recordings);
}

// ---- states

std::vector<uint8_t> saved(Session& session) {
  std::vector<uint8_t> state(llama_state_seq_get_size(session.context(), 0));
  EXPECT_EQ(llama_state_seq_get_data(session.context(), state.data(), state.size(), 0), state.size());
  return state;
}

// Goes on in `to` with what `from` has saved, and in `from`. The devices sum up in another order.
void expect_goes_on(Session& from, Session& to, int at, double later = 1e-5) {
  to.feed(tokens(500, 20), 0, 1);  // layers are known once there was a graph
  const std::vector<uint8_t> state = saved(from);
  llama_memory_clear(to.memory(), false);
  ASSERT_EQ(llama_state_seq_set_data(to.context(), state.data(), state.size(), 0), state.size());
  from.logits.clear();
  to.logits.clear();
  for (int i = at; i < at + 20; i++) {
    from.feed(token(i));
    to.feed(token(i));
  }
  EXPECT_LT(compare({from.logits.front()}, {to.logits.front()}).nmse, 1e-5);
  EXPECT_LT(compare(from.logits, to.logits).nmse, later);
}

TEST_P(Recordings, AStateSavedHereAndOnOneDevice) {
  Places one = GetParam();
  one.split = LLAMA_SPLIT_MODE_LAYER;
  Session here(on(GetParam(), GetParam().recorded)), there(on(one, {"THIMBLE2"}));
  here.feed(tokens(0, 50), 0, 1);
  for (int i = 50; i < 60; i++) here.feed(token(i));
  // Devices that share the heads choose the cells that leave by their own, so later tokens differ as coding makes them.
  const double later = GetParam().split == LLAMA_SPLIT_MODE_TENSOR ? 1e-2 : 1e-5;
  expect_goes_on(here, there, 60, later);
  expect_goes_on(there, here, 80, later);
}

// ---- layers on a GPU and on the CPU, each with the engine of its own

TEST(MixedEngines, EachHasALayer) {
  if (!std::getenv("THIMBLE_TEST_CPU_ENGINE")) GTEST_SKIP() << "no two engines";
  const Places places;
  Options of_plain = on(places, {}).with_bits(0);
  Session mixed(on(places, {"THIMBLE2", "THIMBLE0"})), cpu(on(places, {"THIMBLE2"})), plain(of_plain);
  const std::string log = mixed.log();
  EXPECT_EQ(count(log, "THIMBLE0: KV cache of 1 layers"), 1) << log;
  EXPECT_EQ(count(log, "THIMBLE2: KV cache of 1 layers"), 1) << log;
  EXPECT_EQ(count(log, "CUDA kernels"), 1) << log;
  take_log();
  for (Session* session : {&mixed, &cpu, &plain}) {
    session->feed(tokens(0, 50), 0, 1);
    for (int i = 50; i < 80; i++) session->feed(token(i));
  }
  EXPECT_EQ(count(take_log(), "is recorded now"), 1);
  const Difference coding = compare(plain.logits, cpu.logits), mixing = compare(cpu.logits, mixed.logits);
  EXPECT_GT(coding.nmse, 1e-6) << "nothing was read from codes";
  EXPECT_LT(mixing.nmse, 0.05 * coding.nmse);
  expect_goes_on(mixed, cpu, 80);
  expect_goes_on(cpu, mixed, 100);
}

// Experts on the CPU (--override-tensor) leave a graph for each layer, whose attention is recorded.
TEST(RecordedPieces, BetweenExpertsOnTheCpu) {
  if (!std::getenv("THIMBLE_TEST_RECORDING")) GTEST_SKIP() << "no backend that can be recorded";
  const auto options = [](const char* device) {
    Options of = on({}, {device});
    of.model = std::make_shared<TinyModel>(TinyModel{"qwen3moe",
                                                     {{"block_count", uint32_t(kLayers)},
                                                      {"expert_count", 4u},
                                                      {"expert_used_count", 2u},
                                                      {"expert_feed_forward_length", 64u},
                                                      {"attention.key_length", 64u},
                                                      {"attention.value_length", 64u}}});
    of.experts_on_cpu = true;
    return of;
  };
  Session recorded(options("THIMBLE0")), given(options("THIMBLE2"));
  take_log();
  for (Session* session : {&recorded, &given}) {
    session->feed(tokens(0, 40), 0, 1);
    for (int i = 40; i < 70; i++) session->feed(token(i));
  }
  EXPECT_GE(count(take_log(), "is recorded now"), kLayers);
  EXPECT_TRUE(recorded.logits == given.logits);
}

}  // namespace
}  // namespace thimble::test
