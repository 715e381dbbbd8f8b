// Kinds of caches that the small real model does not have: tiny random models of other shapes and architectures, and
// the real model with an adapter. Each is led through prefill, decoding, removal, a context shift where it has one, and
// a saved state.
#include <cstdlib>
#include <ostream>
#include <regex>

#include "ggml-backend-impl.h"
#include "support/plugin_session.h"
#include "support/temporary_folder.h"
#include "support/tiny_model.h"

namespace thimble::test {
namespace {

struct Case {
  std::string name;
  TinyModel model;
  std::vector<int> coded_layers = {2};       // layers that are coded, at a context of 2048
  bool can_remove = true, can_shift = true;  // as llama.cpp has it; sliding windows rule shifts out, too
  int small_cells = 1024;
  bool as_in_plain = false;  // the plugin runs llama.cpp's own operations on decoded rows
  bool latent = false;       // so it does on a device without kernels for latent rows (MLA)
};
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name;
}

const Metadata kExperts = {{"expert_count", 2u}, {"expert_used_count", 2u}, {"expert_feed_forward_length", 64u}};
const Metadata kStateSpace = {{"ssm.conv_kernel", 4u},
                              {"ssm.inner_size", 512u},
                              {"ssm.state_size", 32u},
                              {"ssm.time_step_rank", 8u},
                              {"ssm.group_count", 1u}};

Metadata with(Metadata base, Metadata more) {
  more.merge(base);
  return more;
}

Case heads(uint32_t size, uint32_t n_heads = 2, uint32_t n_kv_heads = 2) {
  return {"Size" + std::to_string(size) + "Heads" + std::to_string(n_heads) + "Of" + std::to_string(n_kv_heads),
          {"llama",
           {{"attention.key_length", size},
            {"attention.value_length", size},
            {"rope.dimension_count", size},
            {"attention.head_count", n_heads},
            {"attention.head_count_kv", n_kv_heads}}}};
}

// Every other layer has a sliding window, whose cache stays f16.
Case different_sizes(uint32_t keys, uint32_t values) {
  return {"Keys" + std::to_string(keys) + "Values" + std::to_string(values),
          {"mimo2", with(kExperts, {{"attention.key_length", keys},
                                    {"attention.value_length", values},
                                    {"rope.dimension_count", 32u},
                                    {"attention.sliding_window", 64u},
                                    {"attention.sliding_window_pattern", std::vector<uint32_t>{0, 1}}})},
          {1},
          true,
          false};
}

TinyModel softcap(uint32_t sliding_window) {
  return {"gemma2",
          {{"attention.sliding_window", sliding_window},
           {"attn_logit_softcapping", 20.0f},
           {"attention.key_length", 64u},
           {"attention.value_length", 64u}}};
}

const Metadata kIndexer = {{"attention.indexer.head_count", 4u},
                           {"attention.indexer.key_length", 64u},
                           {"attention.indexer.block_size", 4u},
                           {"attention.indexer.local_blocks", 1u}};

// Keys and values are one row (MLA): 128 numbers that keys and values are made of, and 64 of position.
TinyModel latent(const std::string& architecture, const Metadata& more) {
  return {architecture, with(with(kExperts, more), {{"attention.head_count_kv", 1u},
                                                    {"attention.key_length", 192u},
                                                    {"attention.value_length", 128u},
                                                    {"attention.key_length_mla", 128u},
                                                    {"attention.value_length_mla", 64u},
                                                    {"attention.q_lora_rank", 128u},
                                                    {"attention.kv_lora_rank", 128u},
                                                    {"rope.dimension_count", 64u},
                                                    {"leading_dense_block_count", 1u},
                                                    {"expert_shared_count", 1u}})};
}

TinyModel picked_by_an_indexer() {
  return {"minimax-m3", with(with(kExperts, kIndexer), {{"attention.indexer.top_k", 8u},  // blocks
                                                        {"leading_dense_block_count", 1u},
                                                        {"expert_shared_count", 1u},
                                                        {"expert_gating_func", 2u},
                                                        {"attention.key_length", 64u},
                                                        {"attention.value_length", 64u},
                                                        {"rope.dimension_count", 64u}})};
}

std::vector<Case> cases() {
  return {
      heads(32),
      heads(48),
      heads(80),
      heads(96),
      heads(112),
      heads(128),
      heads(160),
      heads(192),
      heads(256),
      heads(320),
      heads(512, 4, 2),
      heads(512, 8, 1),
      heads(64, 8, 1),
      heads(64, 6, 2),
      heads(128, 7, 1),
      different_sizes(64, 32),
      different_sizes(96, 128),
      different_sizes(192, 128),
      {"Alibi", {"mpt", {{"attention.max_alibi_bias", 8.0f}}}},
      {"SoftcapAndSmallSlidingWindow", softcap(64), {1}, true, false},
      {"SoftcapAndLargeSlidingWindow", softcap(1500), {2}, true, false, 0},
      {"Sinks",
       {"gpt-oss",
        with(kExperts,
             {{"attention.sliding_window", 64u}, {"attention.key_length", 64u}, {"attention.value_length", 64u}})},
       {1},
       true,
       false},
      // Two kinds of layers, each with heads of its own size, and a cache of one layer for two.
      {"SharedBetweenLayers",
       {"gemma4",
        {{"block_count", 4u},
         {"attention.shared_kv_layers", 2u},
         {"embedding_length_per_layer_input", 32u},
         {"attention.key_length", 64u},
         {"attention.value_length", 64u},
         {"attention.key_length_swa", 32u},
         {"attention.value_length_swa", 32u},
         {"rope.dimension_count", 64u},
         {"rope.dimension_count_swa", 32u},
         {"attention.sliding_window", 64u},
         {"attention.sliding_window_pattern", std::vector<uint32_t>{1, 0, 1, 0}}}},
       {1},
       true,
       false},
      {"LatentRows", latent("deepseek2", {}), {2}, true, true, 1024, false, true},
      {"LatentRowsWithIndexer",
       latent("glm-dsa", with(kIndexer, {{"attention.indexer.top_k", 64u}})),
       {2},
       true,
       true,
       1024,
       false,
       true},
      {"RowsPickedByAnIndexer", picked_by_an_indexer(), {2}, true, true, 1024, true},
      {"HybridInEveryLayer", {"falcon-h1", kStateSpace}, {2}, false, false},
      {"HybridByLayer",
       {"lfm2", {{"shortconv.l_cache", 3u}, {"attention.head_count_kv", std::vector<uint32_t>{4, 0}}}},
       {1},
       false,
       false},
      {"Recurrent", {"mamba", kStateSpace}, {}, false, false},
      {"MultimodalRope",
       {"qwen2vl", {{"rope.dimension_sections", std::vector<uint32_t>{16, 8, 8, 0}}}},
       {2},
       true,
       false},
  };
}

class PluginModels : public testing::TestWithParam<Case> {};

Tokens tokens(int first, int n) {
  Tokens all;
  for (int i = first; i < first + n; i++) all.push_back((i * i + 31 * i) % kTinyVocabulary);
  return all;
}

void lead_through(Session& session, const Case& c) {
  session.feed(tokens(0, 150), 0, 40);
  for (int i = 0; i < 4; i++) session.feed(tokens(150 + i, 1));
  if (c.can_remove) {
    ASSERT_TRUE(llama_memory_seq_rm(session.memory(), 0, 120, -1));
    session.feed(tokens(300, 20), 0, 4);
  }
  if (c.can_remove) {
    ASSERT_EQ(llama_memory_can_shift(session.memory()), c.can_shift);
  }
  if (c.can_shift) {
    ASSERT_TRUE(llama_memory_seq_rm(session.memory(), 0, 10, 50));
    llama_memory_seq_add(session.memory(), 0, 50, -1, -40);
    session.feed(tokens(400, 3), 0, 3);
  }
  std::vector<uint8_t> state(llama_state_seq_get_size(session.context(), 0));
  state.resize(llama_state_seq_get_data(session.context(), state.data(), state.size(), 0));
  ASSERT_TRUE(llama_memory_seq_rm(session.memory(), 0, -1, -1));
  ASSERT_EQ(llama_state_seq_set_data(session.context(), state.data(), state.size(), 0), state.size());
  for (int i = 0; i < 4; i++) session.feed(tokens(500 + i, 1));
}

// Only the CPU's engine has kernels for latent rows.
bool attends_to_latent_rows() {
  return !std::getenv("THIMBLE_TEST_PLUGIN");
}

TEST_P(PluginModels, AsPlain) {
  const Case& c = GetParam();
  const bool as_in_plain = c.as_in_plain || (c.latent && !attends_to_latent_rows());
  Options options;
  options.model = std::make_shared<TinyModel>(c.model);
  options.n_ctx = 2048;
  options.small_cells = c.small_cells;
  options.plain_flash_attention = as_in_plain;
  std::vector<Logits> plain;
  double rounding = 0;
  {
    Session session(options.with_bits(0));
    ASSERT_NO_FATAL_FAILURE(lead_through(session, c));
    plain = session.logits;
  }
  for (double bits : rates({16, 4})) {
    Session session(options.with_bits(bits));
    ASSERT_NO_FATAL_FAILURE(lead_through(session, c));
    std::vector<int> coded_layers;
    const std::string log = session.log() + take_log();
    const std::regex line("thimble: KV cache of ([0-9]+) layers");
    for (std::sregex_iterator found(log.begin(), log.end(), line), end; found != end; ++found) {
      coded_layers.push_back(std::stoi((*found)[1]));
    }
    EXPECT_EQ(coded_layers, c.coded_layers);
    if (attends_to_latent_rows()) {
      EXPECT_EQ(log.find("attention is computed from rows of the KV cache that are decoded") != log.npos, as_in_plain);
    }
    const double nmse = compare(plain, session.logits).nmse;
    std::printf("%s, %g bits: NMSE %.1e\n", c.name.c_str(), bits, nmse);
    if (bits == 16 || c.coded_layers.empty()) {
      // ggml's flash attention sums values in f16, and an indexer may choose the other of two nearly equal cells.
      EXPECT_LT(nmse, as_in_plain ? 5e-6 : c.model.architecture == "glm-dsa" ? 5e-5 : 1e-6);
      rounding = nmse;
    } else {
      EXPECT_LT(nmse, 0.03);
      EXPECT_GT(nmse, 5 * rounding) << "nothing was read from codes";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, PluginModels, testing::ValuesIn(cases()), [](const auto& info) { return info.param.name; });

TEST(PluginLatentRows, OfSeveralSequences) {
  for (const auto& [unified, flash_attention] : {std::pair{true, true}, {false, true}, {true, false}, {false, false}}) {
    std::vector<Logits> plain;
    for (double bits : {0.0, 16.0, 4.0}) {
      Options options;
      options.model = std::make_shared<TinyModel>(latent("deepseek2", {}));
      options.bits = bits;
      options.n_seq = 2;
      options.unified = unified;
      options.n_ctx = 2048;
      options.coded_flash_attention = flash_attention;
      options.plain_flash_attention = flash_attention && !attends_to_latent_rows();
      Session session(options);
      session.feed_together({{0, tokens(0, 70)}, {1, tokens(300, 60)}}, 4);
      for (int i = 0; i < 4; i++) session.feed_together({{0, tokens(70 + i, 1)}, {1, tokens(360 + i, 1)}});
      llama_memory_seq_rm(session.memory(), 1, -1, -1);
      llama_memory_seq_cp(session.memory(), 0, 1, -1, -1);
      for (int i = 0; i < 4; i++) session.feed_together({{0, tokens(80 + i, 1)}, {1, tokens(90 + i, 1)}});
      if (bits == 0) {
        plain = session.logits;
        continue;
      }
      const double nmse = compare(plain, session.logits).nmse;
      std::printf("%g bits, %s, flash attention %d: NMSE %.1e\n", bits, unified ? "unified" : "streams",
                  flash_attention, nmse);
      EXPECT_LT(nmse, bits == 16 ? 1e-6 : 0.03);
      if (bits == 4) {
        EXPECT_GT(nmse, 1e-5) << "nothing was read from codes";
      }
    }
  }
}

ggml_backend_dev_t cpu_device() {
  return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

// ggml-cuda has no flash attention for some head sizes. llama.cpp then goes without it, or says why it cannot.
TEST(PluginFlashAttention, ThatTheDeviceLacks) {
  if (attends_to_latent_rows()) GTEST_SKIP() << "the CPU's engine attends itself";
  static bool (*const supports)(ggml_backend_dev_t, const ggml_tensor*) = cpu_device()->iface.supports_op;
  Options options;
  options.model = std::make_shared<TinyModel>(heads(48).model);
  options.n_ctx = 2048;
  std::vector<Logits> plain;
  {
    Session session(options.with_bits(0));
    session.feed(tokens(0, 150), 0, 4);
    plain = session.logits;
  }
  // The plugin asks its inner device about nodes on decoded rows, which no node computes; llama.cpp asks the same
  // device about its own.
  cpu_device()->iface.supports_op = [](ggml_backend_dev_t device, const ggml_tensor* op) {
    const bool is_on_rows = op->op == GGML_OP_FLASH_ATTN_EXT && op->src[1]->op == GGML_OP_NONE;
    return !is_on_rows && supports(device, op);
  };
  for (const uint32_t n_seq : {1u, 4u}) {
    for (const bool unified : {true, false}) {
      options.n_seq = n_seq;
      options.unified = unified;
      options.bits = 4;
      options.coded_flash_attention = true;
      options.leaves_flash_attention = false;
      for (const uint32_t n_ubatch : {64u, n_seq}) {  // or all graphs have as many tokens as there are sequences
        options.n_ubatch = n_ubatch;
        try {
          Session session(options);
          ADD_FAILURE() << "a context was made, with batches of " << n_ubatch;
        } catch (const std::runtime_error& error) {
          EXPECT_NE(std::string(error.what()).find("start without --flash-attn on"), std::string::npos) << error.what();
        }
      }
      options.leaves_flash_attention = true;
      for (const uint32_t n_ubatch : {n_seq, 64u}) {
        options.n_ubatch = n_ubatch;
        Session session(options);
        session.feed(tokens(0, 150), 0, 4);
        EXPECT_LT(compare(plain, session.logits).nmse, 0.03);
      }
    }
  }
  cpu_device()->iface.supports_op = supports;
}

// Where sequences share a stream, MiniMax-M3 attends to all cells, and no graph touches the indexer's cache.
TEST(PluginIndexer, ThatIsNotUsed) {
  std::vector<Logits> plain;
  for (double bits : {0.0, 16.0}) {
    Options options;
    options.model = std::make_shared<TinyModel>(picked_by_an_indexer());
    options.bits = bits;
    options.n_seq = 2;
    options.n_ctx = 2048;
    Session session(options);
    session.feed_together({{0, tokens(0, 40)}, {1, tokens(300, 30)}}, 4);
    std::vector<uint8_t> state(llama_state_seq_get_size(session.context(), 0));
    state.resize(llama_state_seq_get_data(session.context(), state.data(), state.size(), 0));
    ASSERT_TRUE(llama_memory_seq_rm(session.memory(), 0, -1, -1));
    ASSERT_EQ(llama_state_seq_set_data(session.context(), state.data(), state.size(), 0), state.size());
    for (int i = 0; i < 4; i++) session.feed_together({{0, tokens(70 + i, 1)}, {1, tokens(360 + i, 1)}});
    if (bits == 0) plain = session.logits;
    if (bits > 0) {
      EXPECT_LT(compare(plain, session.logits).nmse, 1e-6);
    }
  }
}

// Without a profile the weights of the norms say which numbers of keys are great, whichever op shows them.
TEST(PluginNorms, GreatNumbersOfKeysDoNoHarm) {
  for (bool flash_attention : {true, false}) {
    double nmse[2];
    for (bool great : {false, true}) {
      Options options;
      options.model = std::make_shared<TinyModel>(TinyModel{"qwen3", {}, great});
      options.n_ctx = 2048;
      options.coded_flash_attention = flash_attention;
      std::vector<Logits> plain;
      for (double bits : {0.0, 4.0}) {
        Session session(options.with_bits(bits));
        session.feed(tokens(0, 300), 0, 4);
        for (int i = 0; i < 6; i++) session.feed(tokens(300 + i, 1));
        if (bits == 0) plain = session.logits;
        if (bits > 0) nmse[great] = compare(plain, session.logits).nmse;
      }
    }
    std::printf("flash attention %d: NMSE %.1e, with great keys %.1e\n", flash_attention, nmse[0], nmse[1]);
    EXPECT_GT(nmse[0], 1e-6) << "nothing was read from codes";
    EXPECT_LT(nmse[1], 4 * nmse[0]);
  }
}

using PluginAdapter = PluginTest;

TEST_F(PluginAdapter, OfKeysAndValues) {
  const TemporaryFolder folder;
  const std::string path = folder.file("adapter.gguf");
  write_adapter(path, load_model(false).get(), 4);
  std::vector<Logits> without;
  expect_like_plain({}, [&](Session& s) {
    if (without.empty()) {
      Session bare(s.options());
      bare.feed(text(0, 90), 0, 4);
      without = bare.logits;
    }
    llama_adapter_lora* adapter = llama_adapter_lora_init(s.model(), path.c_str());
    ASSERT_NE(adapter, nullptr);
    float scale = 1;
    ASSERT_EQ(llama_set_adapters_lora(s.context(), &adapter, 1, &scale), 0);
    s.feed(text(0, 90), 0, 4);
    EXPECT_GT(compare(without, s.logits).mean_kl, 0.02) << "the adapter does nothing";
    for (int i = 0; i < 6; i++) s.feed(text(90 + i, 1));
  });
}

}  // namespace
}  // namespace thimble::test
